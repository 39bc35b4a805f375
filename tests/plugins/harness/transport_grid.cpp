#include "transport_grid.h"

#include <stdexcept>

#include "banded_transport/scalar.h"
#include "banded_transport/tensor_core.h"
#include "emulated_block.h"
#include "number_format_name.h"

namespace sws {
namespace {

template <typename Element>
void run_all(const TransportRun& run) {
  const TransportProblem& problem = run.problem;
  const int tiles = tile_rows(problem) * tile_columns(problem);
  const int parts = run.parts;
  const bool reversed = run.reversed;
  if (!run.tensor_cores) {
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

void run_transport(TransportRun const& run) {
  with_element(run.problem.format, [&](auto element) { run_all<decltype(element)>(run); });
}

}  // namespace sws
