// Runs the banded transport's kernel bodies over their whole grid.
#include "transport_case.h"

#include <stdexcept>

#include "banded_transport/scalar.h"
#include "banded_transport/tensor_core.h"
#include "emulated_block.h"
#include "number_format_name.h"

namespace sws {
namespace {

template <typename Element>
void run_path(const Case& test, const TransportProblem& problem) {
  const int tiles = tile_rows(problem) * tile_columns(problem);
  const int parts = test.integer("parts");
  const bool reversed = test.integer("reversed") != 0;
  if (test.text("path") == "scalar") {
    run_grid<kScalarThreads>(tiles, parts, problem.batch, scalar_transport_bytes(problem.radius), reversed,
                             [&](auto& block) { transport_scalar<Element>(block, problem, parts); });
    return;
  }
  if constexpr (sizeof(Element) == 2) {
    if (problem.radius <= 4) {
      run_grid<kTransportThreads>(tiles, parts, problem.batch, BandGeometry<4>::kSharedBytes, reversed,
                                  [&](auto& block) { transport_tensor_core<Element, 4>(block, problem, parts); });
    } else {
      run_grid<kTransportThreads>(tiles, parts, problem.batch, BandGeometry<8>::kSharedBytes, reversed,
                                  [&](auto& block) { transport_tensor_core<Element, 8>(block, problem, parts); });
    }
  } else {
    throw std::runtime_error("the tensor-core path has no float32 kernel");
  }
}

}  // namespace

void run_transport_case(const Case& test) {
  TransportProblem problem = {};
  problem.tensors = test.integer("tensors");
  problem.batch = test.integer("batch");
  problem.height = test.integer("height");
  problem.width = test.integer("width");
  problem.channels = test.integer("channels");
  problem.radius = test.integer("radius");
  problem.format = format_of_name(test.text("format"));

  const std::vector<unsigned char> weights = test.read("weights");
  problem.weights = reinterpret_cast<const float*>(weights.data());
  std::vector<std::vector<unsigned char>> inputs;
  std::vector<std::vector<unsigned char>> outputs;
  for (int n = 0; n < problem.tensors; ++n) {
    inputs.push_back(test.read("x" + std::to_string(n)));
    outputs.emplace_back(inputs.back().size(), static_cast<unsigned char>(0xFF));
  }
  for (size_t n = 0; n < inputs.size(); ++n) {
    problem.inputs[n] = inputs[n].data();
    problem.outputs[n] = outputs[n].data();
  }
  with_element(problem.format, [&](auto element) { run_path<decltype(element)>(test, problem); });
  for (size_t n = 0; n < outputs.size(); ++n) {
    test.write("y" + std::to_string(n), outputs[n].data(), outputs[n].size());
  }
}

}  // namespace sws
