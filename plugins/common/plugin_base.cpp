#include "common/plugin_base.h"

#include <exception>
#include <limits>
#include <stdexcept>

#include "common/device.h"
#include "common/plugin_log.h"

namespace sws {
namespace {

using nvinfer1::DataType;

constexpr int32_t kFailed = 1;

// Runs work() and returns its value; an exception becomes an error message and `failed`.
template <typename Result, typename Work>
Result shielded(const char* where, Result failed, Work work) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    log_message(Severity::kERROR, where, {error.what()});
  } catch (...) {
    log_message(Severity::kERROR, where, {"unknown exception"});
  }
  return failed;
}

TensorShape shape_of(nvinfer1::Dims const& dims, DataType type) {
  return TensorShape{std::vector<int64_t>(dims.d, dims.d + (dims.nbDims > 0 ? dims.nbDims : 0)), type};
}

TensorShape shape_of(nvinfer1::PluginTensorDesc const& tensor) { return shape_of(tensor.dims, tensor.type); }

TensorShape shape_of(nvinfer1::DynamicPluginTensorDesc const& tensor) { return shape_of(tensor.desc); }

template <typename Description>
TensorShapes shapes_of(Description const* inputs, int input_count, Description const* outputs, int output_count) {
  TensorShapes shapes;
  for (int i = 0; i < input_count; ++i) shapes.inputs.push_back(shape_of(inputs[i]));
  for (int i = 0; i < output_count; ++i) shapes.outputs.push_back(shape_of(outputs[i]));
  return shapes;
}

}  // namespace

bool TensorShape::known() const {
  for (int64_t size : dims) {
    if (size < 0) return false;
  }
  return true;
}

std::string describe_shape(TensorShape const& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.dims.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape.dims[i]);
  return text + "]";
}

void require_rank(TensorShape const& shape, size_t rank, const char* tensor) {
  if (shape.dims.size() != rank) {
    throw std::invalid_argument(std::string(tensor) + ": expected " + std::to_string(rank) + " dimensions, found " +
                                describe_shape(shape));
  }
}

void require_dimension(TensorShape const& shape, size_t axis, int64_t expected, const char* tensor) {
  const int64_t found = shape.dims.at(axis);
  if (found > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(std::string(tensor) + " " + describe_shape(shape) + ": more than 2^31 - 1 at axis " +
                                std::to_string(axis));
  }
  if (found == -1 || (found > 0 && (expected == -1 || found == expected))) return;
  throw std::invalid_argument(std::string(tensor) + " " + describe_shape(shape) + ": expected " +
                              (expected == -1 ? "a positive number" : std::to_string(expected)) + " at axis " +
                              std::to_string(axis));
}

void require_batch(TensorShape const& shape, const char* tensor) {
  if (shape.dims.at(0) <= kMaxGridZ) return;
  throw std::invalid_argument(std::string(tensor) + " " + describe_shape(shape) + ": a batch of at most " +
                              std::to_string(kMaxGridZ) + " samples is possible");
}

NumberFormat number_format(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return NumberFormat::kFloat32;
    case DataType::kHALF:
      return NumberFormat::kFloat16;
    case DataType::kBF16:
      return NumberFormat::kBFloat16;
    default:
      throw std::invalid_argument("expected float32, float16 or bfloat16, found data type " +
                                  std::to_string(static_cast<int>(type)));
  }
}

nvinfer1::IPluginCapability* PluginBase::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* PluginBase::clone() noexcept {
  return shielded<nvinfer1::IPluginV3*>(name_, nullptr, [&] { return copy(); });
}

nvinfer1::PluginFieldCollection const* PluginBase::getFieldsToSerialize() noexcept {
  return shielded<nvinfer1::PluginFieldCollection const*>(name_, nullptr, [&] {
    if (!fields_written_) write_fields(fields_);
    fields_written_ = true;
    return fields_.collection();
  });
}

bool PluginBase::type_fits(int position, nvinfer1::DynamicPluginTensorDesc const* tensors) const {
  const DataType type = tensors[position].desc.type;
  const bool is_input = position < input_count();
  const bool of_model = is_input ? input_has_model_type(position) : output_has_model_type(position - input_count());
  if (!of_model) return type == DataType::kFLOAT;
  if (position == first_model_input()) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
  }
  return type == tensors[first_model_input()].desc.type;
}

bool PluginBase::supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                           int32_t inputs, int32_t outputs) noexcept {
  return shielded(name_, false, [&] {
    if (inputs != input_count() || outputs != output_count()) {
      throw std::invalid_argument("expected " + std::to_string(input_count()) + " inputs and " +
                                  std::to_string(output_count()) + " outputs, found " + std::to_string(inputs) +
                                  " and " + std::to_string(outputs));
    }
    const bool linear = tensors[position].desc.format == nvinfer1::TensorFormat::kLINEAR;
    const bool fits = linear && type_fits(position, tensors);
    if (!fits) {
      const std::string type = std::to_string(static_cast<int>(tensors[position].desc.type));
      const std::string format = std::to_string(static_cast<int>(tensors[position].desc.format));
      log_message(Severity::kVERBOSE, name_,
                  {"tensor ", std::to_string(position).c_str(), ": refused data type ", type.c_str(), " with format ",
                   format.c_str()});
    }
    return fits;
  });
}

int32_t PluginBase::getOutputDataTypes(DataType* outputs, int32_t output_count, DataType const* inputs,
                                       int32_t input_count) const noexcept {
  return shielded(name_, kFailed, [&]() -> int32_t {
    if (input_count != this->input_count() || output_count != this->output_count()) {
      throw std::invalid_argument("expected " + std::to_string(this->input_count()) + " inputs, found " +
                                  std::to_string(input_count));
    }
    for (int i = 0; i < output_count; ++i) {
      outputs[i] = output_has_model_type(i) ? inputs[first_model_input()] : DataType::kFLOAT;
    }
    return 0;
  });
}

int32_t PluginBase::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count, nvinfer1::DimsExprs const*,
                                    int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count,
                                    nvinfer1::IExprBuilder&) noexcept {
  return shielded(name_, kFailed, [&]() -> int32_t {
    if (input_count != this->input_count() || output_count != this->output_count()) {
      throw std::invalid_argument("expected " + std::to_string(this->input_count()) + " inputs, found " +
                                  std::to_string(input_count));
    }
    for (int i = 0; i < output_count; ++i) {
      int rank = 0;
      nvinfer1::DimsExprs const& source = inputs[output_shape_source(i, &rank)];
      if (source.nbDims < rank) throw std::invalid_argument("an input has too few dimensions");
      outputs[i].nbDims = rank;
      for (int axis = 0; axis < rank; ++axis) outputs[i].d[axis] = source.d[axis];
    }
    return 0;
  });
}

void PluginBase::check_all(TensorShapes const& shapes) const {
  if (shapes.inputs.size() != static_cast<size_t>(input_count()) ||
      shapes.outputs.size() != static_cast<size_t>(output_count())) {
    throw std::invalid_argument("expected " + std::to_string(input_count()) + " inputs and " +
                                std::to_string(output_count()) + " outputs, found " +
                                std::to_string(shapes.inputs.size()) + " and " + std::to_string(shapes.outputs.size()));
  }
  for (int i = 0; i < input_count(); ++i) {
    const DataType type = shapes.inputs[static_cast<size_t>(i)].type;
    if (!input_has_model_type(i) && type != DataType::kFLOAT) {
      throw std::invalid_argument("input " + std::to_string(i) + ": expected float32, found data type " +
                                  std::to_string(static_cast<int>(type)));
    }
    if (input_has_model_type(i)) number_format(type);
  }
  check_shapes(shapes);
}

int32_t PluginBase::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                    nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t output_count) noexcept {
  return shielded(name_, kFailed, [&]() -> int32_t {
    check_all(shapes_of(inputs, input_count, outputs, output_count));
    return 0;
  });
}

size_t PluginBase::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                    nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept {
  return shielded<size_t>(name_, 0, [&]() -> size_t {
    TensorShapes largest;
    for (int i = 0; i < input_count; ++i) largest.inputs.push_back(shape_of(inputs[i].max, inputs[i].desc.type));
    for (TensorShape const& shape : largest.inputs) {
      if (!shape.known()) throw std::invalid_argument("the largest shape of an input is not known");
    }
    return workspace_bytes(largest);
  });
}

int32_t PluginBase::onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count,
                                  nvinfer1::PluginTensorDesc const* outputs, int32_t output_count) noexcept {
  return shielded(name_, kFailed, [&]() -> int32_t {
    check_all(shapes_of(inputs, input_count, outputs, output_count));
    return 0;
  });
}

int32_t PluginBase::enqueue(nvinfer1::PluginTensorDesc const* input_descriptions,
                            nvinfer1::PluginTensorDesc const* output_descriptions, void const* const* inputs,
                            void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return shielded(name_, kFailed, [&]() -> int32_t {
    const TensorShapes shapes = shapes_of(input_descriptions, input_count(), output_descriptions, output_count());
    const cudaError_t error = launch(shapes, inputs, outputs, workspace, stream);
    if (error == cudaSuccess) return 0;
    log_message(Severity::kERROR, name_, {"CUDA: ", cudaGetErrorName(error), ", ", cudaGetErrorString(error)});
    return kFailed;
  });
}

}  // namespace sws
