// The binary layouts of TensorRT's ILoggerFinder and ILogger, which differ between releases.
//
// Up to TensorRT 10 and TensorRT-RTX 1.4 both are plain classes: their first virtual function is findLogger or log.
// TensorRT 11 and TensorRT-RTX 1.5 derive them from IVersionedInterface, so four entries of the virtual table come
// first. One library serves all of these releases, whichever headers it was compiled with, hence the classes here.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

namespace sws {

using Severity = nvinfer1::ILogger::Severity;

// TensorRT 10, TensorRT-RTX 1.4 and earlier.
struct PlainLayout {
  class Logger {
   public:
    virtual void log(Severity severity, const char* message) noexcept = 0;

   protected:
    virtual ~Logger() = default;
  };

  class LoggerFinder {
   public:
    virtual Logger* findLogger() = 0;

   protected:
    virtual ~LoggerFinder() = default;
  };
};

// TensorRT 11, TensorRT-RTX 1.5 and later.
struct VersionedLayout {
  class Logger : public nvinfer1::IVersionedInterface {
   public:
    virtual void log(Severity severity, const char* message) noexcept = 0;
  };

  class LoggerFinder : public nvinfer1::IVersionedInterface {
   public:
    virtual Logger* findLogger() = 0;
  };
};

enum class LoggerLayout { kUnknown, kPlain, kVersioned };

// The layout that a library of this version uses. `version` is getInferLibVersion(): 10000 major + 100 minor + patch,
// of TensorRT (10 or later) or of TensorRT-RTX (1.x).
constexpr LoggerLayout logger_layout(int32_t version) {
  if (version >= 110000) return LoggerLayout::kVersioned;
  if (version >= 100000) return LoggerLayout::kPlain;
  if (version >= 10500 && version < 20000) return LoggerLayout::kVersioned;
  if (version >= 10000 && version < 10500) return LoggerLayout::kPlain;
  return LoggerLayout::kUnknown;
}

static_assert(logger_layout(101401) == LoggerLayout::kPlain && logger_layout(110400) == LoggerLayout::kVersioned);
static_assert(logger_layout(10400) == LoggerLayout::kPlain && logger_layout(10701) == LoggerLayout::kVersioned);
static_assert(logger_layout(8601) == LoggerLayout::kUnknown && logger_layout(0) == LoggerLayout::kUnknown);

}  // namespace sws
