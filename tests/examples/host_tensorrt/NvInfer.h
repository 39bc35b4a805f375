// As much of TensorRT as run_plan.cpp calls, and in the place of an engine a recurrence that a test can follow:
//
//   out_sample = 0.1 * sample + state,  state' = state + sigma
//
// for a batch of two, with the state of one number a sample. Each run prints where it reads and writes the state.
// Names, arguments and results are those of NVIDIA's header, against which run_plan.cpp is compiled as well.
#pragma once

#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "cuda_fp16.h"

namespace nvinfer1 {

enum class DataType { kFLOAT, kHALF };
enum class TensorIOMode { kNONE, kINPUT, kOUTPUT };
enum class OptProfileSelector { kMIN, kOPT, kMAX };

struct Dims {
  int32_t nbDims;
  int64_t d[8];
};

class ILogger {
 public:
  enum class Severity { kINTERNAL_ERROR, kERROR, kWARNING, kINFO };
  virtual void log(Severity, const char*) noexcept = 0;
  virtual ~ILogger() = default;
};

inline const std::vector<std::string> kNames = {"out_sample",  "sws_state_d1_out", "sample",
                                                "timestep",    "intensity",        "encoder_hidden_states",
                                                "sws_state_d1", "sigma"};

inline Dims shape_of(const std::string& name, int64_t batch) {
  if (name == "sample" || name == "out_sample") return {4, {batch, 3, 4, 2}};
  if (name == "encoder_hidden_states") return {3, {batch, 5, 4}};
  return {1, {batch}};
}

class IExecutionContext {
 public:
  explicit IExecutionContext(bool half) : half_(half) {}
  bool setInputShape(const char* name, const Dims& shape) {
    shaped_[name] = true;
    return shape.d[0] == 2;
  }
  Dims getTensorShape(const char* name) const { return shape_of(name, shaped_.size() == 6 ? 2 : -1); }
  bool setTensorAddress(const char* name, void* address) {
    addresses_[name] = address;
    return address != nullptr;
  }
  bool enqueueV3(void*) {
    if (addresses_.size() != kNames.size()) return false;
    const float* read = static_cast<float*>(addresses_["sws_state_d1"]);
    float* written = static_cast<float*>(addresses_["sws_state_d1_out"]);
    const float* sigma = static_cast<float*>(addresses_["sigma"]);
    const float* timestep = static_cast<float*>(addresses_["timestep"]);
    const float* intensity = static_cast<float*>(addresses_["intensity"]);
    const float* text = static_cast<float*>(addresses_["encoder_hidden_states"]);
    std::fprintf(stderr, "run %p %p %.9g %.9g %.9g %.9g %.9g\n", addresses_["sws_state_d1"], addresses_["sws_state_d1_out"],
                 read[1], sigma[1], timestep[1], intensity[1], text[39]);
    for (size_t i = 0; i < 48; ++i) {
      const float value = 0.1f * (half_ ? float(static_cast<__half*>(addresses_["sample"])[i])
                                        : static_cast<float*>(addresses_["sample"])[i]);
      if (half_) {
        static_cast<__half*>(addresses_["out_sample"])[i] = value + read[i / 24];
      } else {
        static_cast<float*>(addresses_["out_sample"])[i] = value + read[i / 24];
      }
    }
    for (size_t i = 0; i < 2; ++i) written[i] = read[i] + sigma[i];
    return true;
  }

 private:
  bool half_;
  std::map<std::string, bool> shaped_;
  std::map<std::string, void*> addresses_;
};

class ICudaEngine {
 public:
  explicit ICudaEngine(bool half) : half_(half) {}
  IExecutionContext* createExecutionContext() { return new IExecutionContext(half_); }
  int32_t getNbIOTensors() const { return static_cast<int32_t>(kNames.size()); }
  const char* getIOTensorName(int32_t index) const { return kNames[static_cast<size_t>(index)].c_str(); }
  TensorIOMode getTensorIOMode(const char* name) const {
    return std::string(name).find("out") == std::string::npos ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
  }
  Dims getTensorShape(const char* name) const { return shape_of(name, -1); }
  Dims getProfileShape(const char* name, int32_t, OptProfileSelector select) const {
    return shape_of(name, 1 + static_cast<int64_t>(select));
  }
  DataType getTensorDataType(const char* name) const {
    return half_ && std::string(name).find("sample") != std::string::npos ? DataType::kHALF : DataType::kFLOAT;
  }

 private:
  bool half_;
};

class IRuntime {
 public:
  // The stand-in of a plan says the precision, and nothing else.
  ICudaEngine* deserializeCudaEngine(const void* plan, size_t size) {
    const std::string text(static_cast<const char*>(plan), size);
    return text == "fp16" || text == "fp32" ? new ICudaEngine(text == "fp16") : nullptr;
  }
};

inline IRuntime* createInferRuntime(ILogger&) { return new IRuntime; }

}  // namespace nvinfer1
