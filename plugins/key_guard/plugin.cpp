#include "key_guard/plugin.h"

#include <cmath>
#include <stdexcept>

#include "key_guard/kernel.h"

namespace sws {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr const char* kNumHeads = "num_heads";
constexpr const char* kScale = "scale";
constexpr const char* kKeyCap = "key_cap";
constexpr const char* kBisectionSteps = "bisection_steps";
constexpr int kMostHeads = 1024;
constexpr float kLargestScale = 1e4f;

// Inputs. The first three are [B, T, heads * D] of the model's type (q may have another number of rows), the others are
// [B] float32.
enum Input : size_t {
  kQueries,
  kKeys,
  kPermutedKeys,
  kQueryTemperature,
  kAmplitude,
  kBudget,
  kKeyGate,
  kValueGain,
  kInputs,
};
constexpr const char* kInputNames[kInputs] = {"q",         "k",     "k_perm",   "tau_q",
                                              "amplitude", "kappa", "key_gate", "value_gain"};

enum Output : size_t { kAlphaK, kAlphaV, kOutputs };
constexpr const char* kOutputNames[kOutputs] = {"alpha_k", "a_v"};

}  // namespace

std::vector<PluginField> KeyGuardPlugin::fields() {
  return {PluginField(kNumHeads, nullptr, PluginFieldType::kINT32, 1),
          PluginField(kScale, nullptr, PluginFieldType::kFLOAT32, 1),
          PluginField(kKeyCap, nullptr, PluginFieldType::kFLOAT32, 1),
          PluginField(kBisectionSteps, nullptr, PluginFieldType::kINT32, 1)};
}

KeyGuardPlugin* KeyGuardPlugin::create(nvinfer1::PluginFieldCollection const* fields, const char* plugin_namespace) {
  const FieldReader reader(fields, {kNumHeads, kScale, kKeyCap, kBisectionSteps});
  if (!reader.has(kNumHeads)) throw std::invalid_argument("attribute 'num_heads' is missing");
  GuardAttributes attributes;
  attributes.num_heads = reader.integer_between(kNumHeads, 0, 1, kMostHeads);
  attributes.scale = reader.number_between(kScale, 0.0f, 0.0f, kLargestScale);
  attributes.key_cap = reader.number_between(kKeyCap, 0.3f, 0.0f, 1.0f);
  attributes.bisection_steps = reader.integer_between(kBisectionSteps, 7, 1, kMaxBisectionSteps);
  return new KeyGuardPlugin(attributes, plugin_namespace);
}

void KeyGuardPlugin::write_fields(FieldWriter& fields) const {
  fields.add(kNumHeads, attributes_.num_heads);
  fields.add(kScale, attributes_.scale);
  fields.add(kKeyCap, attributes_.key_cap);
  fields.add(kBisectionSteps, attributes_.bisection_steps);
}

int KeyGuardPlugin::input_count() const { return static_cast<int>(kInputs); }

int KeyGuardPlugin::output_count() const noexcept { return static_cast<int>(kOutputs); }

bool KeyGuardPlugin::input_has_model_type(int index) const { return static_cast<size_t>(index) <= kPermutedKeys; }

int KeyGuardPlugin::output_shape_source(int, int* rank) const {
  *rank = 1;
  return static_cast<int>(kAmplitude);
}

void KeyGuardPlugin::check_shapes(TensorShapes const& shapes) const {
  TensorShape const& queries = shapes.inputs[kQueries];
  require_rank(queries, 3, "q");
  for (size_t axis : {0, 1, 2}) require_dimension(queries, axis, -1, "q");
  require_batch(queries, "q");
  if (queries.dims[2] >= 0 && queries.dims[2] % attributes_.num_heads != 0) {
    throw std::invalid_argument("q " + describe_shape(queries) + ": the last axis is no multiple of num_heads = " +
                                std::to_string(attributes_.num_heads));
  }
  for (size_t input : {kKeys, kPermutedKeys}) {
    require_rank(shapes.inputs[input], 3, kInputNames[input]);
    // Queries may be a subset of rows, or those of cross-attention; keys and permuted keys have the same tokens.
    const int64_t tokens = input == kKeys ? -1 : shapes.inputs[kKeys].dims[1];
    require_dimension(shapes.inputs[input], 0, queries.dims[0], kInputNames[input]);
    require_dimension(shapes.inputs[input], 1, tokens, kInputNames[input]);
    require_dimension(shapes.inputs[input], 2, queries.dims[2], kInputNames[input]);
  }
  for (size_t input = kQueryTemperature; input < kInputs; ++input) {
    require_rank(shapes.inputs[input], 1, kInputNames[input]);
    require_dimension(shapes.inputs[input], 0, queries.dims[0], kInputNames[input]);
  }
  for (size_t output = 0; output < kOutputs; ++output) {
    require_rank(shapes.outputs[output], 1, kOutputNames[output]);
    require_dimension(shapes.outputs[output], 0, queries.dims[0], kOutputNames[output]);
  }
}

size_t KeyGuardPlugin::workspace_bytes(TensorShapes const& largest) const {
  TensorShape const& queries = largest.inputs.at(kQueries);
  return guard_workspace_bytes(static_cast<int>(queries.dims.at(0)), static_cast<int>(queries.dims.at(1)),
                               attributes_.num_heads, attributes_.bisection_steps);
}

cudaError_t KeyGuardPlugin::launch(TensorShapes const& shapes, void const* const* inputs, void* const* outputs,
                                   void* workspace, cudaStream_t stream) const {
  TensorShape const& queries = shapes.inputs[kQueries];
  auto scalar = [&](Input input) { return static_cast<const float*>(inputs[input]); };
  GuardProblem problem = {};
  problem.queries = inputs[kQueries];
  problem.keys = inputs[kKeys];
  problem.permuted_keys = inputs[kPermutedKeys];
  problem.query_temperature = scalar(kQueryTemperature);
  problem.amplitude = scalar(kAmplitude);
  problem.budget = scalar(kBudget);
  problem.key_gate = scalar(kKeyGate);
  problem.value_gain = scalar(kValueGain);
  problem.key_mix = static_cast<float*>(outputs[kAlphaK]);
  problem.value_mix = static_cast<float*>(outputs[kAlphaV]);
  problem.batch = static_cast<int>(queries.dims.at(0));
  problem.query_tokens = static_cast<int>(queries.dims.at(1));
  problem.tokens = static_cast<int>(shapes.inputs[kKeys].dims.at(1));
  problem.heads = attributes_.num_heads;
  problem.head_size = static_cast<int>(queries.dims.at(2)) / attributes_.num_heads;
  problem.scale =
      attributes_.scale > 0.0f ? attributes_.scale : 1.0f / std::sqrt(static_cast<float>(problem.head_size));
  problem.key_cap = attributes_.key_cap;
  problem.bisection_steps = attributes_.bisection_steps;
  problem.format = number_format(queries.type);
  return launch_key_guard(problem, workspace, stream);
}

}  // namespace sws
