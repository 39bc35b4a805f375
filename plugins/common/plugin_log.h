// Messages to TensorRT's logger, which the plugin registry provides through setLoggerFinder.
#pragma once

#include <NvInferRuntime.h>

#include <initializer_list>

#include "common/logger_layout.h"

namespace sws {

// Determines the layout of `finder` from the version of the library that it belongs to.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Logs "sws::<where>: " followed by the parts. Writes warnings and errors to the standard error stream if no logger is
// set or the library's version is unknown. Takes no std::string: it is called in the handlers of noexcept functions,
// where constructing one may throw.
void log_message(Severity severity, const char* where, std::initializer_list<const char*> parts) noexcept;

}  // namespace sws
