#include "common/plugin_log.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>

namespace sws {
namespace {

std::atomic<void*> logger_finder{nullptr};
std::atomic<LoggerLayout> layout{LoggerLayout::kUnknown};

// getInferLibVersion() of the library that `finder` belongs to; 0 if it has no such function. The symbol is looked up
// in the library that contains the object's virtual table: Python loads TensorRT with RTLD_LOCAL, so a global lookup
// fails, and one process may load both TensorRT and TensorRT-RTX.
int32_t library_version(const void* finder) {
  const void* virtual_table = nullptr;
  std::memcpy(&virtual_table, finder, sizeof(virtual_table));
  void* found = nullptr;
  Dl_info owner = {};
  if (dladdr(virtual_table, &owner) != 0 && owner.dli_fname != nullptr) {
    if (void* library = dlopen(owner.dli_fname, RTLD_LAZY | RTLD_NOLOAD); library != nullptr) {
      found = dlsym(library, "getInferLibVersion");
      dlclose(library);  // Only the reference of dlopen above: the library stays loaded.
    }
  }
  if (found == nullptr) found = dlsym(RTLD_DEFAULT, "getInferLibVersion");
  return found == nullptr ? 0 : reinterpret_cast<int32_t (*)()>(found)();
}

// Whether there was a logger to pass the message to.
template <typename Layout>
bool pass_to_logger(void* finder, Severity severity, const char* message) {
  auto* logger = static_cast<typename Layout::LoggerFinder*>(finder)->findLogger();
  if (logger == nullptr) return false;
  logger->log(severity, message);
  return true;
}

bool deliver(Severity severity, const char* message) {
  void* finder = logger_finder.load();
  if (finder == nullptr) return false;
  switch (layout.load()) {
    case LoggerLayout::kPlain:
      return pass_to_logger<PlainLayout>(finder, severity, message);
    case LoggerLayout::kVersioned:
      return pass_to_logger<VersionedLayout>(finder, severity, message);
    case LoggerLayout::kUnknown:
      break;
  }
  return false;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept {
  layout.store(finder == nullptr ? LoggerLayout::kUnknown : logger_layout(library_version(finder)));
  logger_finder.store(finder);
}

void log_message(Severity severity, const char* where, std::initializer_list<const char*> parts) noexcept {
  try {
    std::string line = "sws::" + std::string(where) + ": ";
    for (const char* part : parts) line += part;
    if (!deliver(severity, line.c_str()) && severity <= Severity::kWARNING) {
      std::fprintf(stderr, "%s\n", line.c_str());
    }
  } catch (...) {
    // A message that cannot be delivered must not end the process.
    return;
  }
}

}  // namespace sws
