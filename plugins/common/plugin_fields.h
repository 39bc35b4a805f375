// Reading and writing a plugin's attributes as TensorRT's plugin fields.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <deque>
#include <initializer_list>
#include <string>
#include <vector>

namespace sws {

// The fields given to a creator. The getters return `fallback` for a field that is absent, and throw
// std::invalid_argument for one of the wrong type or length, or (integer_between, number_between) out of range.
class FieldReader {
 public:
  // Throws for a field whose name is not among `known`.
  FieldReader(nvinfer1::PluginFieldCollection const* fields, std::initializer_list<const char*> known);

  bool has(const char* name) const { return find(name) != nullptr; }
  int integer_between(const char* name, int fallback, int least, int greatest) const;
  float number_between(const char* name, float fallback, float least, float greatest) const;

 private:
  nvinfer1::PluginField const* find(const char* name) const;

  std::vector<nvinfer1::PluginField> fields_;
};

// Fields and the storage of their values, which TensorRT reads.
class FieldWriter {
 public:
  FieldWriter() = default;
  FieldWriter(FieldWriter const&) = delete;
  FieldWriter& operator=(FieldWriter const&) = delete;

  void add(const char* name, int value);
  void add(const char* name, float value);
  nvinfer1::PluginFieldCollection const* collection();

 private:
  // Deques: adding an element does not move the others.
  std::deque<int32_t> integers_;
  std::deque<float> numbers_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace sws
