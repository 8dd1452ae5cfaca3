// The interface through which XLA calls a handler: the part of its foreign-function ABI that is used here, which is the
// same from version 0.1 to 0.3. XLA's own header, xla/ffi/api/c_api.h of the OpenXLA authors, comes only with a wheel
// of 80 MB; so the layouts are copied, and a test compares them with it. Each struct begins with its own size, from
// which newer versions of XLA know what an older handler has seen.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gatewise::xla {

constexpr int version_major = 0, oldest_minor = 1, newest_minor = 3;

enum class DataType : int { boolean = 1, int32 = 4, int64 = 5, uint8 = 6, float32 = 11, float64 = 12 };
enum class Attribute : int { array = 1, string = 4 };
constexpr int metadata_extension = 1;
constexpr int invalid_argument = 3;

struct Extension {
  std::size_t struct_size;
  int type;
  Extension* next;
};

struct Version {
  std::size_t struct_size;
  Extension* extension;
  int major, minor;
};

struct Metadata {
  std::size_t struct_size;
  Version version;
  std::uint32_t traits;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

struct Buffer {
  std::size_t struct_size;
  Extension* extension;
  DataType dtype;
  void* data;
  std::int64_t rank;
  std::int64_t* dims;  // [rank]
};

// Arguments or results.
struct Buffers {
  std::size_t struct_size;
  Extension* extension;
  std::int64_t size;
  int* types;  // [size], 1: a buffer, and no other types exist
  Buffer** buffers;
};

struct String {
  const char* data;
  std::size_t size;
};

struct Array {
  DataType dtype;
  std::size_t size;
  void* data;
};

struct Attributes {
  std::size_t struct_size;
  Extension* extension;
  std::int64_t size;
  Attribute* types;  // [size]
  String** names;
  void** values;  // Array or String; XLA has other types, which no handler here reads
};

struct Error;
struct NewError {
  std::size_t struct_size;
  Extension* extension;
  const char* message;
  int code;
};

struct Api {
  std::size_t struct_size;
  Extension* extension;
  Version version;
  const void* internal;
  Error* (*create_error)(NewError*);
  // More functions follow, which no handler here calls.
};

struct CallFrame {
  std::size_t struct_size;
  Extension* extension;
  const Api* api;
  void* context;
  int stage;  // always execute
  Buffers arguments, results;
  Attributes attributes;
};

}  // namespace gatewise::xla
