// The plugin library as TensorRT uses it: loaded at run time, accessed through its three exported symbols only.
#pragma once

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace sws_test {

// Throws, which fails the current check.
inline void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

// What getInferLibVersion() of this program returns: by default the version of the headers.
inline int32_t reported_version = NV_TENSORRT_VERSION;

class RecordingLogger final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) errors.emplace_back(message);
  }
  nvinfer1::ILogger* findLogger() override { return this; }

  // Requires that exactly one message was logged and that it contains `part`, then removes it.
  void require_error(const std::string& part) {
    require(errors.size() == 1, "expected one message, found " + std::to_string(errors.size()));
    require(errors[0].find(part) != std::string::npos, "expected '" + part + "' in '" + errors[0] + "'");
    errors.clear();
  }

  std::vector<std::string> errors;  // warnings and errors
};

class Library {
 public:
  explicit Library(const char* path) : handle_(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) throw std::runtime_error(dlerror());
    set_logger_finder(static_cast<nvinfer1::ILoggerFinder*>(&logger));
  }

  // `finder` is a logger finder in the layout of the version that getInferLibVersion() returns.
  template <typename Finder>
  void set_logger_finder(Finder* finder) {
    reinterpret_cast<void (*)(Finder*)>(symbol("setLoggerFinder"))(finder);
  }

  nvinfer1::IPluginCreatorV3One* creator(const std::string& name, const std::string& plugin_namespace) {
    using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
    int32_t count = 0;
    auto* const* creators = reinterpret_cast<GetCreators>(symbol("getCreators"))(count);
    for (int32_t i = 0; i < count; ++i) {
      require(std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0, "not a V3 creator");
      auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
      if (creator->getPluginName() == name && creator->getPluginNamespace() == plugin_namespace) return creator;
    }
    throw std::runtime_error("no creator for " + plugin_namespace + "::" + name);
  }

  RecordingLogger logger;

 private:
  void* symbol(const char* name) {
    void* found = dlsym(handle_, name);
    require(found != nullptr, std::string("symbol missing: ") + name);
    return found;
  }

  void* handle_;
};

// A list of fields and the storage of their values.
class Fields {
 public:
  Fields& add(const char* name, int32_t value) { return add_value(name, value, nvinfer1::PluginFieldType::kINT32); }
  Fields& add(const char* name, int64_t value) { return add_value(name, value, nvinfer1::PluginFieldType::kINT64); }
  Fields& add(const char* name, float value) { return add_value(name, value, nvinfer1::PluginFieldType::kFLOAT32); }
  Fields& add(const char* name, double value) { return add_value(name, value, nvinfer1::PluginFieldType::kFLOAT64); }

  nvinfer1::PluginFieldCollection const* collection() {
    fields_.clear();
    for (Field& field : values_) fields_.emplace_back(field.name, field.bytes, field.type, 1);
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
    return &collection_;
  }

 private:
  struct Field {
    const char* name;
    nvinfer1::PluginFieldType type;
    char bytes[8];
  };

  template <typename T>
  Fields& add_value(const char* name, T value, nvinfer1::PluginFieldType type) {
    Field field{name, type, {}};
    std::memcpy(field.bytes, &value, sizeof(value));
    values_.push_back(field);
    return *this;
  }

  std::vector<Field> values_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

struct Plugin {
  explicit Plugin(nvinfer1::IPluginV3* made) : plugin(made) { require(made != nullptr, "no plugin was created"); }
  ~Plugin() { delete plugin; }
  Plugin(Plugin const&) = delete;
  Plugin& operator=(Plugin const&) = delete;

  nvinfer1::IPluginV3OneCore* core() const {
    return static_cast<nvinfer1::IPluginV3OneCore*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kCORE));
  }
  nvinfer1::IPluginV3OneBuild* build() const {
    return static_cast<nvinfer1::IPluginV3OneBuild*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
  }
  nvinfer1::IPluginV3OneRuntime* runtime() const {
    return static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
  }

  nvinfer1::IPluginV3* plugin;
};

// Descriptions of tensors in the two structures TensorRT uses.
struct Tensor {
  std::vector<int64_t> dims;
  nvinfer1::DataType type;

  nvinfer1::Dims as_dims() const {
    nvinfer1::Dims result{};
    result.nbDims = static_cast<int32_t>(dims.size());
    for (size_t i = 0; i < dims.size(); ++i) result.d[i] = dims[i];
    return result;
  }
  nvinfer1::PluginTensorDesc description() const {
    return nvinfer1::PluginTensorDesc{as_dims(), type, nvinfer1::TensorFormat::kLINEAR, 1.0f};
  }
  nvinfer1::DynamicPluginTensorDesc dynamic() const {
    return nvinfer1::DynamicPluginTensorDesc{description(), as_dims(), as_dims(), as_dims()};
  }
};

inline std::vector<nvinfer1::PluginTensorDesc> descriptions(const std::vector<Tensor>& tensors) {
  std::vector<nvinfer1::PluginTensorDesc> result;
  for (const Tensor& tensor : tensors) result.push_back(tensor.description());
  return result;
}

inline std::vector<nvinfer1::DynamicPluginTensorDesc> dynamic(const std::vector<Tensor>& tensors) {
  std::vector<nvinfer1::DynamicPluginTensorDesc> result;
  for (const Tensor& tensor : tensors) result.push_back(tensor.dynamic());
  return result;
}

// Results of onShapeChange and configurePlugin: 0 if the plugin accepts the shapes.
inline int32_t offer_shapes(const Plugin& plugin, const std::vector<Tensor>& inputs,
                            const std::vector<Tensor>& outputs) {
  const auto in = descriptions(inputs);
  const auto out = descriptions(outputs);
  return plugin.runtime()->onShapeChange(in.data(), static_cast<int32_t>(in.size()), out.data(),
                                         static_cast<int32_t>(out.size()));
}

inline int32_t offer_configuration(const Plugin& plugin, const std::vector<Tensor>& inputs,
                                   const std::vector<Tensor>& outputs) {
  const auto in = dynamic(inputs);
  const auto out = dynamic(outputs);
  return plugin.build()->configurePlugin(in.data(), static_cast<int32_t>(in.size()), out.data(),
                                         static_cast<int32_t>(out.size()));
}

}  // namespace sws_test
