// The interface through which PyTorch shows its tensors without calling Python: the part of DLPack's exchange API that
// is used here, the same in every version 1. The layouts are copied, since dlpack.h comes only with PyTorch, against
// which nothing is compiled; a test compares them with it. (https://dmlc.github.io/dlpack/latest/)
#pragma once

#include <cstdint>

namespace gatewise::dlpack {

constexpr std::uint32_t version_major = 1, version_minor = 1;
constexpr const char* capsule_name = "dlpack_exchange_api";
constexpr std::int32_t cpu = 1;
constexpr std::uint8_t unsigned_integer = 1, floating = 2;

struct Version {
  std::uint32_t major, minor;
};

struct Device {
  std::int32_t type, number;
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t axes;
  DataType dtype;
  std::int64_t* shape;    // [axes]
  std::int64_t* strides;  // [axes], in elements
  std::uint64_t byte_offset;
};

struct Owned {
  Version version;
  void* owner;
  void (*free)(Owned* self);  // from any thread, with the GIL or without
  std::uint64_t flags;
  Tensor tensor;
};

// Functions return 0, or else there is a Python exception.
struct ExchangeApi {
  Version version;
  void* older;
  void* new_tensor;
  void* tensor_of_object;
  int (*object_of)(Owned* tensor, void** object);  // a new reference, which owns the tensor
  int (*look)(void* object, Tensor* tensor);       // what `tensor` points to lives as long as the object
  void* stream;
};

}  // namespace gatewise::dlpack
