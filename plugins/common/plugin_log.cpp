#include "common/plugin_log.h"

#include <atomic>
#include <cstdio>
#include <string>

namespace sws {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder.store(finder); }

void log_message(Severity severity, const char* where, std::initializer_list<const char*> parts) noexcept {
  try {
    std::string line = "sws::" + std::string(where) + ": ";
    for (const char* part : parts) line += part;
    nvinfer1::ILoggerFinder* finder = logger_finder.load();
    nvinfer1::ILogger* logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr) {
      logger->log(severity, line.c_str());
    } else if (severity <= Severity::kWARNING) {
      std::fprintf(stderr, "%s\n", line.c_str());
    }
  } catch (...) {
    // A message that cannot be delivered must not take the process down.
    return;
  }
}

}  // namespace sws
