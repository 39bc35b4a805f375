// The kernels' launches as C functions, for ctypes. Everything returns a
// cudaError_t as an int.
#include "banded_transport/kernel.h"
#include "key_guard/kernel.h"

extern "C" {

// Tensor pointers first, then sizes; format 0 float32, 1 float16, 2 bfloat16.
// x1 and y1 may be null: one tensor then.
int sws_banded_transport(const void* weights, const void* x0, const void* x1, void* y0, void* y1, int batch, int height,
                         int width, int channels, int radius, int format, void* stream) {
  sws::TransportProblem problem = {};
  problem.weights = static_cast<const float*>(weights);
  problem.inputs[0] = x0;
  problem.inputs[1] = x1;
  problem.outputs[0] = y0;
  problem.outputs[1] = y1;
  problem.tensors = x1 == nullptr ? 1 : 2;
  problem.batch = batch;
  problem.height = height;
  problem.width = width;
  problem.channels = channels;
  problem.radius = radius;
  problem.format = static_cast<sws::NumberFormat>(format);
  return static_cast<int>(sws::launch_banded_transport(problem, static_cast<cudaStream_t>(stream)));
}

size_t sws_key_guard_workspace(int batch, int query_tokens, int heads, int bisection_steps) {
  return sws::guard_workspace_bytes(batch, query_tokens, heads, bisection_steps);
}

// scalars: tau_q, amplitude, kappa, key_gate, value_gain, each [batch] float32.
// outputs: alpha_k, a_v.
int sws_key_guard(const void* q, const void* k, const void* k_perm, const float* const* scalars, float* const* outputs,
                  int batch, int query_tokens, int tokens, int heads, int head_size, float scale, float key_cap,
                  int bisection_steps, int format, void* workspace, void* stream) {
  sws::GuardProblem problem = {};
  problem.queries = q;
  problem.keys = k;
  problem.permuted_keys = k_perm;
  problem.query_temperature = scalars[0];
  problem.amplitude = scalars[1];
  problem.budget = scalars[2];
  problem.key_gate = scalars[3];
  problem.value_gain = scalars[4];
  problem.key_mix = outputs[0];
  problem.value_mix = outputs[1];
  problem.batch = batch;
  problem.query_tokens = query_tokens;
  problem.tokens = tokens;
  problem.heads = heads;
  problem.head_size = head_size;
  problem.scale = scale;
  problem.key_cap = key_cap;
  problem.bisection_steps = bisection_steps;
  problem.format = static_cast<sws::NumberFormat>(format);
  return static_cast<int>(sws::launch_key_guard(problem, workspace, static_cast<cudaStream_t>(stream)));
}

const char* sws_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

}  // extern "C"
