// The exported symbols of the shared library: its creators, the entry point for a logger, and a description of the
// build.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include "banded_transport/plugin.h"
#include "common/plugin_creator.h"
#include "common/plugin_log.h"
#include "key_guard/plugin.h"

#define SWS_EXPORT __attribute__((visibility("default")))
#define SWS_TEXT_OF(value) #value
#define SWS_TEXT(value) SWS_TEXT_OF(value)

extern "C" {

// Each operator is registered twice: ONNX parsers look up a node by its attribute `plugin_namespace`, which is empty by
// default, and newer ones then by its domain, which is `sws`.
SWS_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static sws::PluginCreator<sws::BandedTransportPlugin> transport("sws");
  static sws::PluginCreator<sws::BandedTransportPlugin> plain_transport("");
  static sws::PluginCreator<sws::KeyGuardPlugin> guard("sws");
  static sws::PluginCreator<sws::KeyGuardPlugin> plain_guard("");
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&transport, &plain_transport, &guard, &plain_guard};
  count = 4;
  return creators;
}

SWS_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { sws::set_logger_finder(finder); }

// JSON text, valid while the library is loaded.
SWS_EXPORT const char* sws_plugins_build_info() {
  return "{\"operators\": [\"BandedTransport\", \"KeyGuard\"], \"namespaces\": [\"sws\", \"\"], "
         "\"plugin_version\": \"1\", \"architectures\": \"" SWS_ARCHITECTURES "\", \"source_hash\": \"" SWS_SOURCE_HASH
         "\", \"cuda\": \"" SWS_CUDA_VERSION "\", \"tensorrt_headers\": \"" SWS_TEXT(NV_TENSORRT_MAJOR) "." SWS_TEXT(
             NV_TENSORRT_MINOR) "." SWS_TEXT(NV_TENSORRT_PATCH) "\"}";
}

}  // extern "C"
