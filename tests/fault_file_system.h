#ifndef SIMPO_TESTS_FAULT_FILE_SYSTEM_H_
#define SIMPO_TESTS_FAULT_FILE_SYSTEM_H_

#include <errno.h>
#include <fcntl.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>

#include "common/file_system.h"

namespace simpo {

// Files below `root` with a disk that fails or stops at a chosen call, and a model of what that disk
// holds: what was synced is there after a crash, what was not may be or may not (after leveldb's
// fault_injection_test). The real files are changed too, for those who look at them.
class FaultFileSystem : public FileSystem {
 public:
  // How much of what was not synced a crash leaves.
  enum class Survives { kNothing, kNames, kSome };

  explicit FaultFileSystem(std::filesystem::path root) : root_(std::move(root)), tree_(Read(root_)) {}

  // Call number `n`, from 1, fails with `error`.
  void FailAt(int64_t n, int error) { fail_at_ = n, error_ = error; }
  // Call number `n` and all that follow do nothing: the process is gone.
  void CrashAt(int64_t n) { FailAt(n, EIO), crashes_ = true; }
  bool was_hit() const { return calls_ >= fail_at_; }
  int64_t calls() const { return calls_; }

  // Writes what the disk holds after the crash to `target`, which must not exist.
  void Recover(const std::filesystem::path& target, Survives survives, unsigned seed) const {
    std::mt19937 random(seed);
    Write(*tree_, target, survives, random);
  }

  int Open(const std::filesystem::path& path, int flags, mode_t mode) override {
    const std::lock_guard lock(mutex_);
    if (Fails()) return -1;
    const int fd = FileSystem::Open(path, flags, mode);
    if (fd < 0) return fd;
    std::shared_ptr<Node> node = Find(path);
    if (node == nullptr && (flags & O_CREAT) != 0) {
      node = std::make_shared<Node>();
      if (const std::shared_ptr<Node> parent = Find(path.parent_path())) parent->entries[path.filename()] = node;
    }
    if (node != nullptr && (flags & O_TRUNC) != 0) node->data.clear();
    open_[fd] = node;
    return fd;
  }
  ssize_t Write(int fd, const void* data, size_t size) override {
    const std::lock_guard lock(mutex_);
    const bool fails = Fails();
    if (fails && calls_ > fail_at_) return Fail();
    if (fails) size /= 2;  // it stops half-way
    const ssize_t written = FileSystem::Write(fd, data, size);
    if (written > 0 && open_[fd] != nullptr) open_[fd]->data.append(static_cast<const char*>(data), written);
    return fails ? Fail() : written;
  }
  int Sync(int fd) override {
    const std::lock_guard lock(mutex_);
    if (Fails()) return -1;
    if (Node* const node = open_[fd].get()) {
      node->synced_data = node->data;
      node->synced_entries = node->entries;
    }
    return 0;  // the real disk need not be bothered
  }
  int Rename(const std::filesystem::path& from, const std::filesystem::path& to) override {
    const std::lock_guard lock(mutex_);
    if (Fails()) return -1;
    if (FileSystem::Rename(from, to) != 0) return -1;
    const std::shared_ptr<Node> source = Find(from.parent_path()), target = Find(to.parent_path());
    target->entries[to.filename()] = source->entries.at(from.filename());
    source->entries.erase(from.filename());
    return 0;
  }
  int MakeFolder(const std::filesystem::path& path) override {
    const std::lock_guard lock(mutex_);
    if (Fails()) return -1;
    if (FileSystem::MakeFolder(path) != 0) return -1;
    auto node = std::make_shared<Node>();
    node->is_folder = true;
    Find(path.parent_path())->entries[path.filename()] = node;
    return 0;
  }
  int Remove(const std::filesystem::path& path) override {
    const std::lock_guard lock(mutex_);
    if (Fails()) return -1;
    if (FileSystem::Remove(path) != 0) return -1;
    Find(path.parent_path())->entries.erase(path.filename());
    return 0;
  }

 private:
  struct Node {
    bool is_folder = false;
    std::string data, synced_data;
    std::map<std::string, std::shared_ptr<Node>> entries, synced_entries;
  };

  static std::shared_ptr<Node> Read(const std::filesystem::path& path) {
    auto node = std::make_shared<Node>();
    node->is_folder = std::filesystem::is_directory(path);
    if (node->is_folder) {
      for (const auto& item : std::filesystem::directory_iterator(path)) {
        node->entries[item.path().filename()] = Read(item.path());
      }
    } else {
      std::ifstream file(path, std::ios::binary);
      node->data.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
    node->synced_data = node->data;
    node->synced_entries = node->entries;
    return node;
  }

  static void Write(const Node& node, const std::filesystem::path& target, Survives survives, std::mt19937& random) {
    const bool lucky = survives == Survives::kSome && random() % 2 == 0;
    if (!node.is_folder) {
      const std::string& data = lucky ? node.data : node.synced_data;
      std::ofstream file(target, std::ios::binary);
      file.write(data.data(), static_cast<std::streamsize>(data.size()));
      EXPECT_TRUE(file.good()) << target;
      return;
    }
    EXPECT_TRUE(std::filesystem::create_directory(target)) << target;
    for (const auto& [name, child] : lucky || survives == Survives::kNames ? node.entries : node.synced_entries) {
      Write(*child, target / name, survives, random);
    }
  }

  // Null: outside the root, or not there.
  std::shared_ptr<Node> Find(const std::filesystem::path& path) const {
    std::shared_ptr<Node> node = tree_;
    const std::filesystem::path inside = path.lexically_relative(root_);
    if (inside.empty() || *inside.begin() == "..") return nullptr;
    for (const std::filesystem::path& name : inside) {
      if (name == ".") continue;
      const auto it = node->entries.find(name);
      if (it == node->entries.end()) return nullptr;
      node = it->second;
    }
    return node;
  }

  int Fail() const {
    errno = error_;
    return -1;
  }
  bool Fails() {
    ++calls_;
    const bool fails = crashes_ ? calls_ >= fail_at_ : calls_ == fail_at_;
    if (fails) Fail();
    return fails;
  }

  const std::filesystem::path root_;
  const std::shared_ptr<Node> tree_;
  std::map<int, std::shared_ptr<Node>> open_;  // by descriptor; of the last file that had it
  std::mutex mutex_;
  int64_t calls_ = 0;
  int64_t fail_at_ = INT64_MAX;
  int error_ = 0;
  bool crashes_ = false;
};

}  // namespace simpo

#endif  // SIMPO_TESTS_FAULT_FILE_SYSTEM_H_
