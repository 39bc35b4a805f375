// Test cases of the banded transport.
#include "transport_case.h"

#include <string>
#include <vector>

#include "number_format_name.h"
#include "transport_grid.h"

namespace sws {

void run_transport_case(const Case& test) {
  TransportRun run = {};
  TransportProblem& problem = run.problem;
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
  run.tensor_cores = test.text("path") == "tensor_core";
  run.parts = test.integer("parts");
  run.reversed = test.integer("reversed") != 0;
  run_transport(run);
  for (size_t n = 0; n < outputs.size(); ++n) {
    test.write("y" + std::to_string(n), outputs[n].data(), outputs[n].size());
  }
}

}  // namespace sws
