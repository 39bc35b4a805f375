// Tensors: types, formats, shapes, workspace, launches that must fail.
#include "checks.h"

namespace sws_test {
namespace {

using nvinfer1::DataType;
using nvinfer1::TensorFormat;

std::vector<Tensor> transport_inputs(DataType type) {
  return {{{2, 41, 6, 10}, DataType::kFLOAT}, {{2, 60, 320}, type}, {{2, 60, 320}, type}};
}

std::vector<Tensor> transport_outputs(DataType type) { return {{{2, 60, 320}, type}, {{2, 60, 320}, type}}; }

std::vector<Tensor> guard_inputs(DataType type) {
  std::vector<Tensor> inputs(3, Tensor{{2, 60, 320}, type});
  inputs.resize(8, Tensor{{2}, DataType::kFLOAT});
  return inputs;
}

std::vector<Tensor> guard_outputs() { return std::vector<Tensor>(2, Tensor{{2}, DataType::kFLOAT}); }

const DataType kModelTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
const DataType kOtherTypes[] = {DataType::kINT8, DataType::kINT32, DataType::kBOOL, DataType::kFP8, DataType::kINT64};

// Every tensor must take its own type and refuse any other one, and any other format.
void check_formats_of(const Plugin& plugin, std::vector<Tensor> inputs, const std::vector<Tensor>& outputs) {
  const int32_t input_count = static_cast<int32_t>(inputs.size());
  const int32_t output_count = static_cast<int32_t>(outputs.size());
  inputs.insert(inputs.end(), outputs.begin(), outputs.end());
  auto supports = [&](int32_t position, const std::vector<nvinfer1::DynamicPluginTensorDesc>& tensors) {
    return plugin.build()->supportsFormatCombination(position, tensors.data(), input_count, output_count);
  };
  for (int32_t position = 0; position < input_count + output_count; ++position) {
    const auto right = dynamic(inputs);
    require(supports(position, right), "refused its own type at " + std::to_string(position));
    auto wrong = right;
    nvinfer1::DynamicPluginTensorDesc& tensor = wrong[static_cast<size_t>(position)];
    for (DataType type : kOtherTypes) {
      tensor.desc.type = type;
      require(!supports(position, wrong), "took a wrong type at " + std::to_string(position));
    }
    tensor = right[static_cast<size_t>(position)];
    tensor.desc.format = TensorFormat::kHWC8;
    require(!supports(position, wrong), "took a wrong format at " + std::to_string(position));
  }
}

void check_formats(Library& library) {
  const Plugin transport(make_transport(library));
  const Plugin guard(make_guard(library));
  for (DataType type : kModelTypes) {
    check_formats_of(transport, transport_inputs(type), transport_outputs(type));
    check_formats_of(guard, guard_inputs(type), guard_outputs());
  }
  // Mixed model types.
  auto mixed = dynamic(guard_inputs(DataType::kHALF));
  mixed[1].desc.type = DataType::kFLOAT;
  require(!guard.build()->supportsFormatCombination(1, mixed.data(), 8, 2), "took keys of another type than queries");
  // Wrong number of tensors.
  const auto tensors = dynamic(transport_inputs(DataType::kHALF));
  require(!transport.build()->supportsFormatCombination(0, tensors.data(), 2, 1), "took two inputs for three");
  library.logger.require_error("expected 3 inputs and 2 outputs, found 2 and 1");
}

void check_output_types(Library& library) {
  const Plugin transport(make_transport(library));
  const Plugin guard(make_guard(library));
  DataType outputs[2];
  const DataType transport_types[] = {DataType::kFLOAT, DataType::kBF16, DataType::kBF16};
  require(transport.build()->getNbOutputs() == 2, "transport outputs");
  require(transport.build()->getOutputDataTypes(outputs, 2, transport_types, 3) == 0, "refused");
  require(outputs[0] == DataType::kBF16 && outputs[1] == DataType::kBF16, "transport output types");
  const DataType guard_types[] = {DataType::kHALF,  DataType::kHALF,  DataType::kHALF,  DataType::kFLOAT,
                                  DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT};
  require(guard.build()->getNbOutputs() == 2, "guard outputs");
  require(guard.build()->getOutputDataTypes(outputs, 2, guard_types, 8) == 0, "refused");
  require(outputs[0] == DataType::kFLOAT && outputs[1] == DataType::kFLOAT, "guard output types");
  require(guard.build()->getOutputDataTypes(outputs, 2, guard_types, 7) != 0, "took seven inputs");
  library.logger.require_error("expected 8 inputs, found 7");
}

class NoBuilder final : public nvinfer1::IExprBuilder {};

void check_output_shapes(Library& library) {
  NoBuilder builder;
  nvinfer1::DimsExprs inputs[8] = {};
  // Expressions are opaque: distinct addresses will do to see which one arrives where.
  static const char marks[8 * 4] = {};
  for (int i = 0; i < 8; ++i) {
    inputs[i].nbDims = 4;
    for (int axis = 0; axis < 4; ++axis) {
      inputs[i].d[axis] = reinterpret_cast<nvinfer1::IDimensionExpr const*>(&marks[4 * i + axis]);
    }
  }
  nvinfer1::DimsExprs outputs[2] = {};
  const Plugin transport(make_transport(library));
  inputs[1].nbDims = inputs[2].nbDims = 3;
  require(transport.build()->getOutputShapes(inputs, 3, nullptr, 0, outputs, 2, builder) == 0, "refused");
  for (int i = 0; i < 2; ++i) {
    require(outputs[i].nbDims == 3, "transport output rank");
    for (int axis = 0; axis < 3; ++axis) require(outputs[i].d[axis] == inputs[i + 1].d[axis], "transport output axis");
  }
  const Plugin guard(make_guard(library));
  require(guard.build()->getOutputShapes(inputs, 8, nullptr, 0, outputs, 2, builder) == 0, "refused");
  for (int i = 0; i < 2; ++i) require(outputs[i].nbDims == 1 && outputs[i].d[0] == inputs[4].d[0], "guard output");
}

void require_refused(Library& library, const Plugin& plugin, const std::vector<Tensor>& inputs,
                     const std::vector<Tensor>& outputs, const std::string& reason) {
  require(offer_shapes(plugin, inputs, outputs) != 0, "onShapeChange took it: " + reason);
  library.logger.require_error(reason);
  require(offer_configuration(plugin, inputs, outputs) != 0, "configurePlugin took it: " + reason);
  library.logger.require_error(reason);
}

void check_transport_shapes(Library& library) {
  const Plugin plugin(make_transport(library));
  const auto outputs = transport_outputs(DataType::kHALF);
  auto inputs = transport_inputs(DataType::kHALF);
  require(offer_shapes(plugin, inputs, outputs) == 0, "refused the right shapes");
  inputs[0].dims = {-1, 41, -1, -1};
  inputs[1].dims = {-1, -1, 320};
  require(offer_configuration(plugin, inputs, outputs) == 0, "refused unknown dimensions");

  inputs = transport_inputs(DataType::kHALF);
  inputs[0].dims[1] = 145;
  require_refused(library, plugin, inputs, outputs, "P [2, 145, 6, 10]: expected 41 at axis 1");
  inputs = transport_inputs(DataType::kHALF);
  inputs[2].dims[1] = 61;
  require_refused(library, plugin, inputs, outputs, "x [2, 61, 320]: expected 60 at axis 1");
  inputs = transport_inputs(DataType::kHALF);
  inputs[1].dims = {2, 60, 8, 40};
  require_refused(library, plugin, inputs, outputs, "x: expected 3 dimensions, found [2, 60, 8, 40]");
  inputs = transport_inputs(DataType::kHALF);
  inputs[1].dims[0] = 0;
  require_refused(library, plugin, inputs, outputs, "x [0, 60, 320]: expected 2 at axis 0");
  inputs = transport_inputs(DataType::kHALF);
  inputs[0].dims[0] = 65536;
  require_refused(library, plugin, inputs, outputs,
                  "P [65536, 41, 6, 10]: a batch of at most 65535 samples is possible");
  inputs = transport_inputs(DataType::kHALF);
  inputs[0].dims[2] = int64_t{1} << 31;
  require_refused(library, plugin, inputs, outputs, "more than 2^31 - 1 at axis 2");
  inputs = transport_inputs(DataType::kHALF);
  inputs[0].type = DataType::kHALF;
  require_refused(library, plugin, inputs, outputs, "input 0: expected float32");
  inputs.pop_back();
  require_refused(library, plugin, inputs, outputs, "expected 3 inputs and 2 outputs, found 2 and 2");
}

void check_guard_shapes(Library& library) {
  const Plugin plugin(make_guard(library));
  const auto outputs = guard_outputs();
  auto inputs = guard_inputs(DataType::kBF16);
  require(offer_shapes(plugin, inputs, outputs) == 0, "refused the right shapes");
  inputs[0].dims = {-1, -1, 320};
  require(offer_configuration(plugin, inputs, outputs) == 0, "refused unknown dimensions");
  inputs[0].dims = {2, 8, 320};
  require(offer_shapes(plugin, inputs, outputs) == 0, "refused a sample of the query rows");
  inputs[0].dims = {2, 4096, 320};
  require(offer_shapes(plugin, inputs, outputs) == 0, "refused the queries of an image with the keys of a text");

  inputs = guard_inputs(DataType::kBF16);
  for (size_t i = 0; i < 3; ++i) inputs[i].dims[2] = 321;
  require_refused(library, plugin, inputs, outputs, "is no multiple of num_heads = 8");
  inputs = guard_inputs(DataType::kBF16);
  inputs[0].dims[0] = 65536;
  require_refused(library, plugin, inputs, outputs, "a batch of at most 65535 samples is possible");
  inputs = guard_inputs(DataType::kBF16);
  inputs[2].dims[1] = 59;
  require_refused(library, plugin, inputs, outputs, "k_perm [2, 59, 320]: expected 60 at axis 1");
  inputs = guard_inputs(DataType::kBF16);
  inputs[4].dims = {3};
  require_refused(library, plugin, inputs, outputs, "amplitude [3]: expected 2 at axis 0");
  inputs = guard_inputs(DataType::kBF16);
  inputs[5].dims = {};
  require_refused(library, plugin, inputs, outputs, "kappa: expected 1 dimensions, found []");
  inputs = guard_inputs(DataType::kINT32);
  require_refused(library, plugin, inputs, outputs, "expected float32, float16 or bfloat16");
}

size_t workspace_of(const Plugin& plugin, std::vector<Tensor> inputs, const std::vector<Tensor>& outputs) {
  auto in = dynamic(inputs);
  for (auto& tensor : in) tensor.desc.dims.d[0] = -1;
  const auto out = dynamic(outputs);
  return plugin.build()->getWorkspaceSize(in.data(), static_cast<int32_t>(in.size()), out.data(),
                                          static_cast<int32_t>(out.size()));
}

void check_workspace(Library& library) {
  const Plugin transport(make_transport(library));
  require(workspace_of(transport, transport_inputs(DataType::kHALF), transport_outputs(DataType::kHALF)) == 0,
          "the transport needs no workspace");
  const Plugin guard(make_guard(library));
  auto inputs = guard_inputs(DataType::kHALF);
  const size_t small = workspace_of(guard, inputs, guard_outputs());
  for (size_t i = 0; i < 3; ++i) inputs[i].dims[1] = 4096;
  const size_t large = workspace_of(guard, inputs, guard_outputs());
  require(small > 0 && large > 10 * small, "the guard's workspace does not grow with the tokens");
  require(large < (1u << 20), "the guard's workspace is no T x T tensor");
}

// Shapes that no onShapeChange let through must not reach the device, and must not pass in silence.
void check_failed_launches(Library& library) {
  const Plugin transport(make_transport(library));
  const Plugin guard(make_guard(library));
  const void* inputs[8] = {};
  void* outputs[2] = {};
  auto shapes = transport_inputs(DataType::kHALF);
  shapes[0].dims[2] = 0;
  auto in = descriptions(shapes);
  auto out = descriptions(transport_outputs(DataType::kHALF));
  require(transport.runtime()->enqueue(in.data(), out.data(), inputs, outputs, nullptr, nullptr) != 0, "launched");
  library.logger.require_error("cudaErrorInvalidValue");
  shapes = guard_inputs(DataType::kHALF);
  shapes[0].dims[1] = 0;
  in = descriptions(shapes);
  out = descriptions(guard_outputs());
  alignas(16) unsigned char workspace[16];
  require(guard.runtime()->enqueue(in.data(), out.data(), inputs, outputs, workspace, nullptr) != 0, "launched");
  library.logger.require_error("cudaErrorInvalidValue");
  in = descriptions(guard_inputs(DataType::kHALF));
  require(guard.runtime()->enqueue(in.data(), out.data(), inputs, outputs, nullptr, nullptr) != 0,
          "launched without a workspace");
  library.logger.require_error("cudaErrorInvalidValue");
}

// For machines without a GPU: the launch itself fails, with a reason.
void check_missing_driver(Library& library) {
  const void* inputs[8] = {};
  void* outputs[2] = {};
  const Plugin transport(make_transport(library));
  auto in = descriptions(transport_inputs(DataType::kHALF));
  auto out = descriptions(transport_outputs(DataType::kHALF));
  require(transport.runtime()->enqueue(in.data(), out.data(), inputs, outputs, nullptr, nullptr) != 0, "launched");
  library.logger.require_error("CUDA: cudaError");
  const Plugin guard(make_guard(library));
  in = descriptions(guard_inputs(DataType::kHALF));
  out = descriptions(guard_outputs());
  alignas(16) unsigned char workspace[16];
  require(guard.runtime()->enqueue(in.data(), out.data(), inputs, outputs, workspace, nullptr) != 0, "launched");
  library.logger.require_error("CUDA: cudaError");
}

}  // namespace

void add_tensor_checks(std::map<std::string, Check>& checks) {
  checks["formats"] = check_formats;
  checks["output_types"] = check_output_types;
  checks["output_shapes"] = check_output_shapes;
  checks["transport_shapes"] = check_transport_shapes;
  checks["guard_shapes"] = check_guard_shapes;
  checks["workspace"] = check_workspace;
  checks["failed_launches"] = check_failed_launches;
  checks["missing_driver"] = check_missing_driver;
}

}  // namespace sws_test
