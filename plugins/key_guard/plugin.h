// KeyGuard as a TensorRT plugin: see README.md for its inputs, outputs and attributes.
#pragma once

#include "common/plugin_base.h"
#include "key_guard/problem.h"

namespace sws {

struct GuardAttributes {
  int num_heads;
  float scale;  // 0: 1 / sqrt(head size)
  float key_cap;
  int bisection_steps;
};

class KeyGuardPlugin final : public PluginBase {
 public:
  static constexpr const char* kName = "KeyGuard";
  static std::vector<nvinfer1::PluginField> fields();
  static KeyGuardPlugin* create(nvinfer1::PluginFieldCollection const* fields, const char* plugin_namespace);

  KeyGuardPlugin(GuardAttributes attributes, std::string plugin_namespace)
      : PluginBase(kName, std::move(plugin_namespace)), attributes_(attributes) {}

 protected:
  PluginBase* copy() const override { return new KeyGuardPlugin(attributes_, getPluginNamespace()); }
  void write_fields(FieldWriter& fields) const override;
  int input_count() const override;
  int output_count() const noexcept override;
  bool input_has_model_type(int index) const override;
  bool output_has_model_type(int) const override { return false; }
  int first_model_input() const override { return 0; }
  int output_shape_source(int output, int* rank) const override;
  void check_shapes(TensorShapes const& shapes) const override;
  size_t workspace_bytes(TensorShapes const& largest) const override;
  cudaError_t launch(TensorShapes const& shapes, void const* const* inputs, void* const* outputs, void* workspace,
                     cudaStream_t stream) const override;

 private:
  GuardAttributes attributes_;
};

}  // namespace sws
