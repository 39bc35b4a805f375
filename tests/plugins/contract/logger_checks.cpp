// Messages reach loggers in the layouts of TensorRT 10 and 11, and of TensorRT-RTX before and from 1.5 on.
#include "checks.h"

namespace sws_test {
namespace {

using nvinfer1::InterfaceInfo;
using Severity = nvinfer1::ILogger::Severity;

// ILogger and ILoggerFinder as the headers of TensorRT 10 declare them.
class PlainLogger {
 public:
  virtual void log(Severity, const char* message) noexcept { messages.emplace_back(message); }
  virtual ~PlainLogger() = default;

  std::vector<std::string> messages;
};

class PlainFinder {
 public:
  virtual PlainLogger* findLogger() { return &logger; }
  virtual ~PlainFinder() = default;

  PlainLogger logger;
};

// As the headers of TensorRT 11 declare them.
class VersionedLogger : public nvinfer1::IVersionedInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
  virtual void log(Severity, const char* message) noexcept { messages.emplace_back(message); }

  std::vector<std::string> messages;
};

class VersionedFinder : public nvinfer1::IVersionedInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILoggerFinder", 1, 0}; }
  virtual VersionedLogger* findLogger() { return &logger; }

  VersionedLogger logger;
};

void request_invalid_radius(Library& library) {
  Fields fields;
  fields.add("radius", int32_t{9});
  auto* plugin = library.creator("BandedTransport", "sws")
                     ->createPlugin("layer_name", fields.collection(), nvinfer1::TensorRTPhase::kBUILD);
  require(plugin == nullptr, "radius 9 was accepted");
}

template <typename Finder>
void check_layout(Library& library, int32_t version) {
  reported_version = version;
  Finder finder;
  library.set_logger_finder(&finder);
  request_invalid_radius(library);
  const std::vector<std::string>& messages = finder.logger.messages;
  require(messages.size() == 1,
          "version " + std::to_string(version) + ": expected one message, found " + std::to_string(messages.size()));
  require(messages[0].find("expected 1 to 8, found 9") != std::string::npos, messages[0]);
}

void check_logger_layouts(Library& library) {
  for (int32_t version : {100000, 101401, 101601, 10400}) check_layout<PlainFinder>(library, version);
  for (int32_t version : {110000, 110400, 10500, 10701}) check_layout<VersionedFinder>(library, version);
}

// The message must go to the standard error stream: calling a finder of unknown layout could end the process.
void check_unknown_version(Library& library) {
  reported_version = 0;
  PlainFinder finder;
  library.set_logger_finder(&finder);
  request_invalid_radius(library);
  require(finder.logger.messages.empty(), "a logger of unknown layout was called");
}

void check_no_logger(Library& library) {
  library.set_logger_finder(static_cast<PlainFinder*>(nullptr));
  request_invalid_radius(library);
}

}  // namespace

void add_logger_checks(std::map<std::string, Check>& checks) {
  checks["logger_layouts"] = check_logger_layouts;
  checks["unknown_version"] = check_unknown_version;
  checks["no_logger"] = check_no_logger;
}

}  // namespace sws_test
