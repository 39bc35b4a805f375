// Creators: names, attributes, refusals, serialization, clones.
#include <memory>

#include "checks.h"

namespace sws_test {
namespace {

using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

std::string describe(PluginFieldCollection const* fields) {
  require(fields != nullptr, "no fields");
  std::string text;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    nvinfer1::PluginField const& field = fields->fields[i];
    text += std::string(field.name) + "=";
    if (field.type == PluginFieldType::kINT32) {
      int32_t value = 0;
      std::memcpy(&value, field.data, sizeof(value));
      text += std::to_string(value) + " ";
    } else {
      require(field.type == PluginFieldType::kFLOAT32, "a field of an unexpected type");
      float value = 0;
      std::memcpy(&value, field.data, sizeof(value));
      text += std::to_string(value) + " ";
    }
  }
  return text;
}

std::string serialized(const Plugin& plugin) { return describe(plugin.runtime()->getFieldsToSerialize()); }

void check_names(Library& library) {
  for (const char* plugin_namespace : {"sws", ""}) {
    for (const char* name : {"BandedTransport", "KeyGuard"}) {
      nvinfer1::IPluginCreatorV3One* creator = library.creator(name, plugin_namespace);
      require(std::strcmp(creator->getPluginVersion(), "1") == 0, "version");
      require(creator->getFieldNames()->nbFields > 0, "no fields declared");
      Fields fields;
      if (std::strcmp(name, "KeyGuard") == 0) fields.add("num_heads", int32_t{2});
      const Plugin plugin(creator->createPlugin("x", fields.collection(), TensorRTPhase::kBUILD));
      require(std::strcmp(plugin.core()->getPluginName(), name) == 0, "plugin name");
      require(std::strcmp(plugin.core()->getPluginNamespace(), plugin_namespace) == 0, "plugin namespace");
      require(std::strcmp(plugin.core()->getInterfaceInfo().kind, "PLUGIN_V3ONE_CORE") == 0, "core interface");
      require(std::strcmp(plugin.build()->getInterfaceInfo().kind, "PLUGIN_V3ONE_BUILD") == 0, "build interface");
      require(std::strcmp(plugin.runtime()->getInterfaceInfo().kind, "PLUGIN_V3ONE_RUNTIME") == 0, "runtime interface");
    }
  }
}

void check_defaults(Library& library) {
  const Plugin transport(library.creator("BandedTransport", "sws")->createPlugin("x", nullptr, TensorRTPhase::kBUILD));
  require(serialized(transport) == "radius=8 tensors=1 ", serialized(transport));
  Fields fields;
  fields.add("num_heads", int64_t{10}).add("scale", 0.125);
  const Plugin guard(library.creator("KeyGuard", "")->createPlugin("x", fields.collection(), TensorRTPhase::kBUILD));
  require(serialized(guard) == "num_heads=10 scale=0.125000 key_cap=0.300000 bisection_steps=7 ", serialized(guard));
}

void check_refusals(Library& library) {
  struct Refusal {
    const char* creator;
    Fields fields;
    const char* reason;
  };
  Refusal refusals[] = {
      {"BandedTransport", Fields().add("radius", int32_t{9}), "attribute 'radius': expected 1 to 8, found 9"},
      {"BandedTransport", Fields().add("radius", int32_t{0}), "attribute 'radius': expected 1 to 8, found 0"},
      {"BandedTransport", Fields().add("radius", 8.0f), "attribute 'radius': expected an integer"},
      {"BandedTransport", Fields().add("tensors", int32_t{3}), "attribute 'tensors': expected 1 to 2, found 3"},
      {"BandedTransport", Fields().add("radus", int32_t{8}), "unknown attribute 'radus'"},
      {"KeyGuard", Fields(), "attribute 'num_heads' is missing"},
      {"KeyGuard", Fields().add("num_heads", int64_t{1} << 33), "attribute 'num_heads': expected 1 to"},
      {"KeyGuard", Fields().add("num_heads", int32_t{8}).add("key_cap", 1.5f), "attribute 'key_cap'"},
      {"KeyGuard", Fields().add("num_heads", int32_t{8}).add("key_cap", int32_t{1}), "'key_cap': expected a float"},
      {"KeyGuard", Fields().add("num_heads", int32_t{8}).add("bisection_steps", int32_t{17}), "1 to 16, found 17"},
  };
  for (Refusal& refusal : refusals) {
    nvinfer1::IPluginV3* plugin = library.creator(refusal.creator, "sws")
                                      ->createPlugin("layer_name", refusal.fields.collection(), TensorRTPhase::kBUILD);
    require(plugin == nullptr, std::string("was not refused: ") + refusal.reason);
    require(
        library.logger.errors.size() == 1 && library.logger.errors[0].find("layer 'layer_name'") != std::string::npos,
        "the message does not name the layer");
    library.logger.require_error(refusal.reason);
  }
}

void check_serialization(Library& library) {
  for (auto* make : {make_transport, make_guard}) {
    const Plugin plugin(make(library));
    auto* creator = library.creator(plugin.core()->getPluginName(), "sws");
    const Plugin again(creator->createPlugin("x", plugin.runtime()->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    require(serialized(again) == serialized(plugin), "another plugin came back: " + serialized(again));
    require(serialized(plugin) == serialized(plugin), "fields must not pile up");
  }
}

void check_clones(Library& library) {
  for (auto* make : {make_transport, make_guard}) {
    auto original = std::make_unique<Plugin>(make(library));
    const Plugin clone(original->plugin->clone());
    const Plugin attached(original->runtime()->attachToContext(nullptr));
    const std::string fields = serialized(*original);
    const std::string name = original->core()->getPluginName();
    original.reset();
    for (const Plugin* copy : {&clone, &attached}) {
      require(serialized(*copy) == fields, "the clone has other fields");
      require(copy->core()->getPluginName() == name, "the clone has another name");
      require(std::strcmp(copy->core()->getPluginNamespace(), "sws") == 0, "the clone has another namespace");
    }
  }
}

}  // namespace

void add_creator_checks(std::map<std::string, Check>& checks) {
  checks["names"] = check_names;
  checks["defaults"] = check_defaults;
  checks["refusals"] = check_refusals;
  checks["serialization"] = check_serialization;
  checks["clones"] = check_clones;
}

}  // namespace sws_test
