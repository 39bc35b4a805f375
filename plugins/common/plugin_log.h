// Messages to TensorRT's logger, the one the registry hands over through setLoggerFinder.
#pragma once

#include <NvInferRuntime.h>

#include <initializer_list>

namespace sws {

using Severity = nvinfer1::ILogger::Severity;

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Logs "sws::<where>: " and the parts one after the other; to the standard error stream while nobody has set a logger.
// Takes no std::string, whose making may throw where this is called: in handlers of noexcept functions.
void log_message(Severity severity, const char* where, std::initializer_list<const char*> parts) noexcept;

}  // namespace sws
