// One test case: a folder with case.txt ("name value" lines) and tensors as raw <name>.bin files.
#pragma once

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace sws {

class Case {
 public:
  explicit Case(std::filesystem::path folder) : folder_(std::move(folder)) {
    std::ifstream lines(folder_ / "case.txt");
    std::string name;
    std::string value;
    while (lines >> name >> value) values_[name] = value;
    if (values_.empty()) throw std::runtime_error("no case.txt in " + folder_.string());
  }

  const std::string& text(const std::string& name) const {
    const auto found = values_.find(name);
    if (found == values_.end()) throw std::runtime_error("case.txt lacks '" + name + "'");
    return found->second;
  }

  int integer(const std::string& name) const { return std::stoi(text(name)); }
  float real(const std::string& name) const { return std::stof(text(name)); }

  // Heap memory of exactly the file's size, so that the address sanitizer sees the first byte beyond it.
  std::vector<unsigned char> read(const std::string& name) const {
    std::ifstream file(folder_ / (name + ".bin"), std::ios::binary);
    if (!file) throw std::runtime_error("no tensor '" + name + "' in " + folder_.string());
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }

  void write(const std::string& name, const void* data, size_t bytes) const {
    std::ofstream file(folder_ / (name + ".bin"), std::ios::binary);
    file.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
    if (!file) throw std::runtime_error("cannot write '" + name + "' to " + folder_.string());
  }

 private:
  std::filesystem::path folder_;
  std::map<std::string, std::string> values_;
};

}  // namespace sws
