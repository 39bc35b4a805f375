#pragma once

#include <functional>
#include <map>
#include <string>

#include "library.h"

namespace sws_test {

using Check = std::function<void(Library&)>;

void add_creator_checks(std::map<std::string, Check>& checks);
void add_tensor_checks(std::map<std::string, Check>& checks);
void add_logger_checks(std::map<std::string, Check>& checks);

// The plugins that the checks use: a transport of two tensors with radius 4, a guard of 8 heads.
inline nvinfer1::IPluginV3* make_transport(Library& library) {
  Fields fields;
  fields.add("radius", int32_t{4}).add("tensors", int32_t{2});
  return library.creator("BandedTransport", "sws")
      ->createPlugin("transport", fields.collection(), nvinfer1::TensorRTPhase::kBUILD);
}

inline nvinfer1::IPluginV3* make_guard(Library& library) {
  Fields fields;
  fields.add("num_heads", int32_t{8}).add("key_cap", 0.25f).add("bisection_steps", int32_t{6});
  return library.creator("KeyGuard", "sws")
      ->createPlugin("guard", fields.collection(), nvinfer1::TensorRTPhase::kBUILD);
}

}  // namespace sws_test
