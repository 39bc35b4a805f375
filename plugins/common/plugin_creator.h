// Creates the plugins of one operator: from a node's attributes, and from the fields of a serialized engine.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <vector>

#include "common/plugin_log.h"

namespace sws {

// Plugin has kName, fields() -> std::vector<PluginField> (names and types), create(fields, namespace) -> Plugin*.
template <typename Plugin>
class PluginCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit PluginCreator(const char* plugin_namespace) : namespace_(plugin_namespace), fields_(Plugin::fields()) {
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }

  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return Plugin::kName; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return "1"; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return namespace_; }
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }

  nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    try {
      return Plugin::create(fields, namespace_);
    } catch (const std::exception& error) {
      log_message(Severity::kERROR, Plugin::kName, {"layer '", name == nullptr ? "" : name, "': ", error.what()});
    } catch (...) {
      log_message(Severity::kERROR, Plugin::kName, {"unknown exception"});
    }
    return nullptr;
  }

 private:
  const char* namespace_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace sws
