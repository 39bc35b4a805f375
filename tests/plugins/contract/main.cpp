// Calls the plugin library through TensorRT's interfaces: contract LIBRARY CHECK. Exits with 1 and a reason on failure.
#include <cstdio>
#include <exception>

#include "checks.h"

// The symbol by which the library determines TensorRT's version.
int32_t getInferLibVersion() noexcept { return sws_test::reported_version; }

int main(int argc, char** argv) {
  std::map<std::string, sws_test::Check> checks;
  sws_test::add_creator_checks(checks);
  sws_test::add_tensor_checks(checks);
  sws_test::add_logger_checks(checks);
  if (argc != 3 || checks.count(argv[2]) == 0) {
    std::fprintf(stderr, "usage: contract LIBRARY CHECK; checks:");
    for (const auto& check : checks) std::fprintf(stderr, " %s", check.first.c_str());
    return 2;
  }
  try {
    sws_test::Library library(argv[1]);
    checks[argv[2]](library);
    for (const std::string& error : library.logger.errors) throw std::runtime_error("unexpected message: " + error);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[2], error.what());
    return 1;
  }
  return 0;
}
