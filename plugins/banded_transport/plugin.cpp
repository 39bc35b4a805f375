#include "banded_transport/plugin.h"

#include <stdexcept>

#include "banded_transport/kernel.h"

namespace sws {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr const char* kRadius = "radius";
constexpr const char* kTensors = "tensors";

// Inputs.
constexpr size_t kWeights = 0;
constexpr size_t kFirstTensor = 1;

}  // namespace

std::vector<PluginField> BandedTransportPlugin::fields() {
  return {PluginField(kRadius, nullptr, PluginFieldType::kINT32, 1),
          PluginField(kTensors, nullptr, PluginFieldType::kINT32, 1)};
}

BandedTransportPlugin* BandedTransportPlugin::create(nvinfer1::PluginFieldCollection const* fields,
                                                     const char* plugin_namespace) {
  const FieldReader reader(fields, {kRadius, kTensors});
  const int radius = reader.integer_between(kRadius, kMaxTransportRadius, 1, kMaxTransportRadius);
  const int tensors = reader.integer_between(kTensors, 1, 1, kMaxTransportTensors);
  return new BandedTransportPlugin(radius, tensors, plugin_namespace);
}

void BandedTransportPlugin::write_fields(FieldWriter& fields) const {
  fields.add(kRadius, radius_);
  fields.add(kTensors, tensors_);
}

int BandedTransportPlugin::output_shape_source(int output, int* rank) const {
  *rank = 3;
  return static_cast<int>(kFirstTensor) + output;
}

void BandedTransportPlugin::check_shapes(TensorShapes const& shapes) const {
  TensorShape const& weights = shapes.inputs[kWeights];
  require_rank(weights, 4, "P");
  for (size_t axis : {0, 2, 3}) require_dimension(weights, axis, -1, "P");
  require_dimension(weights, 1, offset_count(radius_), "P");
  require_batch(weights, "P");
  TensorShape const& first = shapes.inputs[kFirstTensor];
  const int64_t tokens = weights.dims[2] < 0 || weights.dims[3] < 0 ? -1 : weights.dims[2] * weights.dims[3];
  for (int n = 0; n < tensors_; ++n) {
    const size_t index = static_cast<size_t>(n);
    for (TensorShape const* shape : {&shapes.inputs[kFirstTensor + index], &shapes.outputs[index]}) {
      const char* name = shape == &shapes.outputs[index] ? "y" : "x";
      require_rank(*shape, 3, name);
      require_dimension(*shape, 0, weights.dims[0], name);
      require_dimension(*shape, 1, tokens, name);
      require_dimension(*shape, 2, first.dims[2], name);
    }
  }
}

cudaError_t BandedTransportPlugin::launch(TensorShapes const& shapes, void const* const* inputs, void* const* outputs,
                                          void*, cudaStream_t stream) const {
  TransportProblem problem = {};
  TensorShape const& weights = shapes.inputs[kWeights];
  TensorShape const& first = shapes.inputs[kFirstTensor];
  problem.weights = static_cast<const float*>(inputs[kWeights]);
  for (int n = 0; n < tensors_; ++n) {
    problem.inputs[n] = inputs[kFirstTensor + static_cast<size_t>(n)];
    problem.outputs[n] = outputs[n];
  }
  problem.tensors = tensors_;
  problem.batch = static_cast<int>(weights.dims.at(0));
  problem.height = static_cast<int>(weights.dims.at(2));
  problem.width = static_cast<int>(weights.dims.at(3));
  problem.channels = static_cast<int>(first.dims.at(2));
  problem.radius = radius_;
  problem.format = number_format(first.type);
  return launch_banded_transport(problem, stream);
}

}  // namespace sws
