#include "common/plugin_fields.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

namespace sws {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

[[noreturn]] void fail(const char* name, const std::string& expected, const std::string& found) {
  throw std::invalid_argument("attribute '" + std::string(name) + "': expected " + expected + ", found " + found);
}

// The data of a field may be unaligned.
template <typename T>
T value_of(PluginField const& field) {
  T value;
  std::memcpy(&value, field.data, sizeof(value));
  return value;
}

void check_single(PluginField const& field) {
  if (field.data == nullptr || field.length != 1) {
    fail(field.name, "one value", std::to_string(field.length) + " values");
  }
}

std::string type_number(PluginField const& field) {
  return "field type " + std::to_string(static_cast<int>(field.type));
}

}  // namespace

FieldReader::FieldReader(nvinfer1::PluginFieldCollection const* fields, std::initializer_list<const char*> known) {
  if (fields == nullptr || fields->fields == nullptr) return;
  fields_.assign(fields->fields, fields->fields + fields->nbFields);
  for (PluginField const& field : fields_) {
    bool found = false;
    for (const char* name : known) found = found || std::strcmp(name, field.name) == 0;
    if (!found) throw std::invalid_argument("unknown attribute '" + std::string(field.name) + "'");
  }
}

PluginField const* FieldReader::find(const char* name) const {
  for (PluginField const& field : fields_) {
    if (std::strcmp(field.name, name) == 0) return &field;
  }
  return nullptr;
}

int FieldReader::integer_between(const char* name, int fallback, int least, int greatest) const {
  PluginField const* field = find(name);
  int64_t value = fallback;
  if (field != nullptr) {
    check_single(*field);
    if (field->type == PluginFieldType::kINT32) {
      value = value_of<int32_t>(*field);
    } else if (field->type == PluginFieldType::kINT64) {
      value = value_of<int64_t>(*field);
    } else {
      fail(name, "an integer", type_number(*field));
    }
  }
  if (value < least || value > greatest) {
    fail(name, std::to_string(least) + " to " + std::to_string(greatest), std::to_string(value));
  }
  return static_cast<int>(value);
}

float FieldReader::number_between(const char* name, float fallback, float least, float greatest) const {
  PluginField const* field = find(name);
  float value = fallback;
  if (field != nullptr) {
    check_single(*field);
    if (field->type == PluginFieldType::kFLOAT32) {
      value = value_of<float>(*field);
    } else if (field->type == PluginFieldType::kFLOAT64) {
      value = static_cast<float>(value_of<double>(*field));
    } else {
      fail(name, "a float", type_number(*field));
    }
  }
  if (!std::isfinite(value) || value < least || value > greatest) {
    fail(name, std::to_string(least) + " to " + std::to_string(greatest), std::to_string(value));
  }
  return value;
}

void FieldWriter::add(const char* name, int value) {
  integers_.push_back(value);
  fields_.emplace_back(name, &integers_.back(), PluginFieldType::kINT32, 1);
}

void FieldWriter::add(const char* name, float value) {
  numbers_.push_back(value);
  fields_.emplace_back(name, &numbers_.back(), PluginFieldType::kFLOAT32, 1);
}

nvinfer1::PluginFieldCollection const* FieldWriter::collection() {
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
  return &collection_;
}

}  // namespace sws
