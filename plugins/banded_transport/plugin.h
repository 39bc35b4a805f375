// BandedTransport as a TensorRT plugin: see README.md for its inputs, outputs and attributes.
#pragma once

#include "banded_transport/problem.h"
#include "common/plugin_base.h"

namespace sws {

class BandedTransportPlugin final : public PluginBase {
 public:
  static constexpr const char* kName = "BandedTransport";
  static std::vector<nvinfer1::PluginField> fields();
  static BandedTransportPlugin* create(nvinfer1::PluginFieldCollection const* fields, const char* plugin_namespace);

  BandedTransportPlugin(int radius, int tensors, std::string plugin_namespace)
      : PluginBase(kName, std::move(plugin_namespace)), radius_(radius), tensors_(tensors) {}

 protected:
  PluginBase* copy() const override { return new BandedTransportPlugin(radius_, tensors_, getPluginNamespace()); }
  void write_fields(FieldWriter& fields) const override;
  int input_count() const override { return 1 + tensors_; }
  int output_count() const noexcept override { return tensors_; }
  bool input_has_model_type(int index) const override { return index > 0; }
  bool output_has_model_type(int) const override { return true; }
  int first_model_input() const override { return 1; }
  int output_shape_source(int output, int* rank) const override;
  void check_shapes(TensorShapes const& shapes) const override;
  size_t workspace_bytes(TensorShapes const&) const override { return 0; }
  cudaError_t launch(TensorShapes const& shapes, void const* const* inputs, void* const* outputs, void* workspace,
                     cudaStream_t stream) const override;

 private:
  int radius_;
  int tensors_;
};

}  // namespace sws
