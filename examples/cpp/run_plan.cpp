// Loads a plan that sws-export wrote and samples with it. The state never leaves the GPU: two sets of buffers
// are used in turn, one read while the other is written.
//
//   run_plan ENGINE STEPS [TEXT] > latent.f32
//
// TEXT holds encoder_hidden_states as float32. Tensors are identified by their names, so that no manifest is
// read: sws_state_* is a state, sws_state_*_out the one that follows it. Shapes are the best ones of the profile.
#include <NvInfer.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

using namespace nvinfer1;
using Floats = std::vector<float>;

class Log final : public ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", message);
  }
};

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

void cuda(cudaError_t code) { require(code == cudaSuccess, std::string("CUDA: ") + cudaGetErrorString(code)); }

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  require(file.good(), path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

// An input or output. Zeros are the state with which an image begins, and the value of inputs that nobody fills.
struct Tensor {
  bool half = false;
  size_t count = 1;
  std::unique_ptr<void, cudaError_t (*)(void*)> places[2] = {{nullptr, cudaFree}, {nullptr, cudaFree}};

  size_t bytes() const { return count * (half ? sizeof(__half) : sizeof(float)); }
  void allocate(int place) {
    void* memory = nullptr;
    cuda(cudaMalloc(&memory, bytes()));
    places[place].reset(memory);
    cuda(cudaMemset(memory, 0, bytes()));
  }
  void upload(const Floats& values) {
    require(values.size() == count, std::to_string(values.size()) + " values in place of " + std::to_string(count));
    const std::vector<__half> halves(values.begin(), values.end());
    const void* source = half ? static_cast<const void*>(halves.data()) : values.data();
    cuda(cudaMemcpy(places[0].get(), source, bytes(), cudaMemcpyHostToDevice));
  }
  Floats download() const {
    Floats values(count);
    std::vector<__half> halves(count);
    void* target = half ? static_cast<void*>(halves.data()) : values.data();
    cuda(cudaMemcpy(target, places[0].get(), bytes(), cudaMemcpyDeviceToHost));
    return half ? Floats(halves.begin(), halves.end()) : values;
  }
};

using Tensors = std::map<std::string, Tensor>;

bool is_state(const std::string& name) { return name.rfind("sws_state_", 0) == 0 || name.rfind("calls", 0) == 0; }

// The step of Stable Diffusion's training schedule whose noise level is the first at or above sigma.
int timestep_of(double sigma) {
  double kept = 1;
  for (int step = 0; step < 1000; ++step) {
    const double root = std::sqrt(0.00085) + (std::sqrt(0.012) - std::sqrt(0.00085)) * step / 999;
    kept *= 1 - root * root;
    if (std::sqrt((1 - kept) / kept) >= sigma) return step;
  }
  return 999;
}

Tensors allocate(ICudaEngine& engine, IExecutionContext& context) {
  Tensors tensors;
  // Inputs first: the shapes of the outputs follow from theirs.
  for (const TensorIOMode mode : {TensorIOMode::kINPUT, TensorIOMode::kOUTPUT}) {
    for (int index = 0; index < engine.getNbIOTensors(); ++index) {
      const std::string name = engine.getIOTensorName(index);
      if (engine.getTensorIOMode(name.c_str()) != mode) continue;
      const bool input = mode == TensorIOMode::kINPUT;
      Dims shape = input ? engine.getTensorShape(name.c_str()) : context.getTensorShape(name.c_str());
      if (input && std::count(shape.d, shape.d + shape.nbDims, -1) > 0) {
        shape = engine.getProfileShape(name.c_str(), 0, OptProfileSelector::kOPT);
        require(context.setInputShape(name.c_str(), shape), "the engine refuses its own shape of " + name);
      }
      const DataType type = engine.getTensorDataType(name.c_str());
      require(type == DataType::kFLOAT || type == DataType::kHALF, name + " is neither float32 nor float16");
      Tensor& tensor = tensors[name];
      tensor.half = type == DataType::kHALF;
      for (int axis = 0; axis < shape.nbDims; ++axis) tensor.count *= static_cast<size_t>(shape.d[axis]);
      tensor.allocate(0);
      if (input && is_state(name)) tensor.allocate(1);
    }
  }
  return tensors;
}

// A state is read from the place `read`, and the one that follows is written to the other.
void* address(Tensors& tensors, const std::string& name, int read) {
  if (!is_state(name)) return tensors.at(name).places[0].get();
  const size_t end = name.rfind("_out");
  return end == std::string::npos ? tensors.at(name).places[read].get()
                                  : tensors.at(name.substr(0, end)).places[1 - read].get();
}

Floats sample(IExecutionContext& context, Tensors& tensors, int steps) {
  const size_t batch = tensors.at("intensity").count;
  std::mt19937 random(0);
  std::normal_distribution<float> normal(0, 14);
  Floats latent(tensors.at("sample").count);
  for (float& value : latent) value = normal(random);
  tensors.at("intensity").upload(Floats(batch, 0.5f));
  for (int step = 0; step < steps; ++step) {
    const double sigma = 14 * std::pow(0.3 / 14, 1.0 * step / steps), fall = std::pow(0.3 / 14, 1.0 / steps);
    Floats scaled(latent);
    for (float& value : scaled) value /= static_cast<float>(std::sqrt(sigma * sigma + 1));
    tensors.at("sample").upload(scaled);
    if (tensors.count("sigma") != 0) tensors.at("sigma").upload(Floats(batch, static_cast<float>(sigma)));
    tensors.at("timestep").upload(Floats(batch, static_cast<float>(timestep_of(sigma))));
    for (const auto& [name, tensor] : tensors) {
      require(context.setTensorAddress(name.c_str(), address(tensors, name, step % 2)), "no address for " + name);
    }
    require(context.enqueueV3(nullptr), "the engine refuses to run");
    cuda(cudaStreamSynchronize(nullptr));
    const Floats noise = tensors.at("out_sample").download();
    for (size_t i = 0; i < noise.size(); ++i) latent[i] += static_cast<float>(sigma * (fall - 1)) * noise[i];
    std::fprintf(stderr, "step %d of %d, sigma %.3f\n", step + 1, steps, sigma);
  }
  return latent;
}

void run(const std::string& path, int steps, const char* text) {
  cuda(cudaSetDevice(0));
  const std::vector<char> plan = read_file(path);
  Log log;
  const std::unique_ptr<IRuntime> runtime(createInferRuntime(log));
  require(runtime != nullptr, "TensorRT cannot start");
  const std::unique_ptr<ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
  require(engine != nullptr, path + " is for another GPU or version of TensorRT; build it again");
  const std::unique_ptr<IExecutionContext> context(engine->createExecutionContext());
  require(context != nullptr, "the GPU has no room for this engine");
  Tensors tensors = allocate(*engine, *context);
  if (text != nullptr) {
    const std::vector<char> raw = read_file(text);
    Floats values(raw.size() / sizeof(float));
    std::copy_n(raw.begin(), values.size() * sizeof(float), reinterpret_cast<char*>(values.data()));
    tensors.at("encoder_hidden_states").upload(values);
  }
  const Floats latent = sample(*context, tensors, steps);
  std::fwrite(latent.data(), sizeof(float), latent.size(), stdout);
}

int main(int argc, char** argv) {
  if (argc < 3 || std::atoi(argv[2]) < 1) {
    std::fprintf(stderr, "usage: run_plan ENGINE STEPS [TEXT] > latent.f32\n");
    return 2;
  }
  try {
    run(argv[1], std::atoi(argv[2]), argc > 3 ? argv[3] : nullptr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_plan: %s\n", error.what());
    return 1;
  }
  return 0;
}
