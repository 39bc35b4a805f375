// Messages to TensorRT's logger, the one the registry hands over through setLoggerFinder.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace sws {

using Severity = nvinfer1::ILogger::Severity;

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Logs "sws::<where>: <message>"; to the standard error stream while nobody has set a logger.
void log_message(Severity severity, const std::string& where, const std::string& message) noexcept;

}  // namespace sws
