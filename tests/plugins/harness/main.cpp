// Runs test cases on the CPU: each argument is the folder of one case (see case.h). Exits with 1 at the first failure.
#include <cstdio>
#include <exception>
#include <string>

#include "arithmetic_case.h"
#include "emulator_case.h"
#include "guard_case.h"
#include "transport_case.h"

namespace {

void run(const sws::Case& test) {
  const std::string& kind = test.text("operator");
  if (kind == "banded_transport") return sws::run_transport_case(test);
  if (kind == "key_guard") return sws::run_guard_case(test);
  if (kind == "emulator") return sws::run_emulator_case(test);
  if (kind == "arithmetic") return sws::run_arithmetic_case(test);
  throw std::runtime_error("unknown operator '" + kind + "'");
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    try {
      run(sws::Case(argv[i]));
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n", argv[i], error.what());
      return 1;
    }
  }
  return 0;
}
