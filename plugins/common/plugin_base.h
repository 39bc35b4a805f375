// Base class of all operators: an IPluginV3 with the core, build and runtime capabilities in one object.
//
// An operator defines its types, shapes and launch in functions that may throw. This class implements TensorRT's
// noexcept functions with them and logs every refusal.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "common/number_formats.h"
#include "common/plugin_fields.h"

namespace sws {

// Shape and type of a tensor. TensorRT has four structures for them; operators use this one.
struct TensorShape {
  std::vector<int64_t> dims;  // -1: unknown
  nvinfer1::DataType type;

  bool known() const;
};

struct TensorShapes {
  std::vector<TensorShape> inputs;
  std::vector<TensorShape> outputs;
};

class PluginBase : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public nvinfer1::IPluginV3OneBuild,
                   public nvinfer1::IPluginV3OneRuntime {
 public:
  PluginBase(const char* name, std::string plugin_namespace) : name_(name), namespace_(std::move(plugin_namespace)) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;

  nvinfer1::AsciiChar const* getPluginName() const noexcept final { return name_; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept final { return "1"; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept final { return namespace_.c_str(); }

  nvinfer1::IPluginV3* clone() noexcept final;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept final { return clone(); }
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept final;

  int32_t getNbOutputs() const noexcept final { return output_count(); }
  bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                 int32_t outputs) noexcept final;
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, nvinfer1::DataType const* inputs,
                             int32_t input_count) const noexcept final;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count, nvinfer1::DimsExprs const*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t output_count, nvinfer1::IExprBuilder&) noexcept final;
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t output_count) noexcept final;
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t output_count) const noexcept final;

  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count,
                        nvinfer1::PluginTensorDesc const* outputs, int32_t output_count) noexcept final;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* input_descriptions,
                  nvinfer1::PluginTensorDesc const* output_descriptions, void const* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept final;

 protected:
  virtual PluginBase* copy() const = 0;
  virtual void write_fields(FieldWriter& fields) const = 0;
  virtual int input_count() const = 0;
  virtual int output_count() const noexcept = 0;
  // Whether the input or output has the precision of the model; otherwise it is float32.
  virtual bool input_has_model_type(int index) const = 0;
  virtual bool output_has_model_type(int index) const = 0;
  // The first input of the model's type; the input whose first `rank` dimensions are those of an output.
  virtual int first_model_input() const = 0;
  virtual int output_shape_source(int output, int* rank) const = 0;
  // Throws std::invalid_argument with the reason; dimensions of -1 are unknown.
  virtual void check_shapes(TensorShapes const& shapes) const = 0;
  virtual size_t workspace_bytes(TensorShapes const& largest) const = 0;
  virtual cudaError_t launch(TensorShapes const& shapes, void const* const* inputs, void* const* outputs,
                             void* workspace, cudaStream_t stream) const = 0;

 private:
  bool type_fits(int position, nvinfer1::DynamicPluginTensorDesc const* tensors) const;
  void check_all(TensorShapes const& shapes) const;

  const char* name_;
  std::string namespace_;
  FieldWriter fields_;
  bool fields_written_ = false;
};

// Throws unless `shape` has the rank.
void require_rank(TensorShape const& shape, size_t rank, const char* tensor);

// Throws unless the dimension is unknown or as expected (expected -1: anything positive).
void require_dimension(TensorShape const& shape, size_t axis, int64_t expected, const char* tensor);

// Throws if there are more samples than a launch allows.
void require_batch(TensorShape const& shape, const char* tensor);

std::string describe_shape(TensorShape const& shape);

// Throws for a type that no kernel supports.
NumberFormat number_format(nvinfer1::DataType type);

}  // namespace sws
