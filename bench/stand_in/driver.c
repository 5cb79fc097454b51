/* A library that plays libcuda.so.1 and starts nothing: it checks what it is asked to start, and counts.
 *
 * Triton's runtime calls it as it would call a driver. The limits are those that the CUDA driver API documents for
 * cuTensorMapEncodeTiled and cuLaunchKernelEx, and those of the GPU that stand_in_device() described. What breaks one
 * is refused as a driver would refuse it, and kept as a finding: one line that names the offender. bench/stand_in/driver.py
 * builds it and reads the findings. */
#include "cuda.h"

#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WIDTH = 400, KEPT = 256, SHARED_BEFORE_OPT_IN = 49152, THREADS = 1024, RESERVED = 1024, CUDA_CODE = 190 };

static struct {
  int major, minor, shared_block, shared_processor, processors, registers;
} device;

struct function {
  char name[WIDTH / 2];
  int registers, max_threads, shared_static, shared_dynamic, wide_clusters;
  atomic_long launches;
  struct function *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct function *functions; /* never freed: a process loads a few hundred */
static char findings[KEPT][WIDTH];
static long found;
static atomic_long launches, maps;
static atomic_int capturing; /* whether a stream is being captured into a graph */
static char context; /* its address stands for the one context */

/* ---- what bench/stand_in/driver.py calls ---- */

void stand_in_device(int major, int minor, int shared_block, int shared_processor, int processors) {
  device.major = major;
  device.minor = minor;
  device.shared_block = shared_block;
  device.shared_processor = shared_processor;
  device.processors = processors;
  device.registers = 65536;
}

/* From here on, or no longer, what a driver refuses while a stream is captured is refused. To wait, to copy and to
 * allocate are not among it, for this library has no entry for them: a runtime that asks for one cannot be loaded. */
void stand_in_capture(int on) { capturing = on; }

long stand_in_launches(void) { return launches; }
long stand_in_maps(void) { return maps; }
long stand_in_found(void) { return found; }

/* The i-th finding, NULL where there is none or no room was left for its text. */
const char *stand_in_finding(long i) { return i >= 0 && i < found && i < KEPT ? findings[i] : NULL; }

/* Walks the functions that were loaded: from NULL to the last; the name and the launches of each. */
const void *stand_in_next(const void *at, const char **name, long *count) {
  const struct function *next = at ? ((const struct function *)at)->next : functions;
  if (next) {
    *name = next->name;
    *count = next->launches;
  }
  return next;
}

void stand_in_reset(void) {
  pthread_mutex_lock(&lock);
  found = 0;
  launches = maps = 0;
  for (struct function *f = functions; f; f = f->next) f->launches = 0;
  pthread_mutex_unlock(&lock);
}

/* ---- findings ---- */

struct text {
  char at[WIDTH];
  size_t length;
};

__attribute__((format(printf, 2, 3))) static void add(struct text *text, const char *format, ...) {
  va_list values;
  va_start(values, format);
  int wrote = vsnprintf(text->at + text->length, WIDTH - text->length, format, values);
  va_end(values);
  if (wrote > 0) text->length += (size_t)wrote < WIDTH - text->length ? (size_t)wrote : WIDTH - 1 - text->length;
}

/* Keeps "WHO: WHAT" and returns what the driver would. */
static CUresult refuse(const char *who, const struct text *what, CUresult result) {
  pthread_mutex_lock(&lock);
  if (found < KEPT) snprintf(findings[found], WIDTH, "%.150s: %.240s", who, what->at);
  found++;
  pthread_mutex_unlock(&lock);
  return result;
}

#define CHECK(fine, ...)                                                                                               \
  do {                                                                                                                 \
    if (!(fine)) {                                                                                                     \
      if (wrong.length) add(&wrong, "; ");                                                                             \
      add(&wrong, __VA_ARGS__);                                                                                        \
    }                                                                                                                  \
  } while (0)

/* ---- device, context and modules ---- */

CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_SUCCESS               ? "no error"
          : error == CUDA_ERROR_NOT_SUPPORTED ? "operation not supported (the stand-in driver says why)"
                                              : "invalid argument (the stand-in driver says which)";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *at, int ordinal) {
  *at = 0;
  return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice at) {
  (void)at;
  switch ((int)attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = device.major; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = device.minor; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = SHARED_BEFORE_OPT_IN; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = device.shared_block; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = device.shared_processor; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = device.registers; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = device.processors; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 1; break; /* asked for, used by nobody here */
  default: *value = 0; return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *current) {
  *current = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *current, CUdevice at) { return (void)at, cuCtxGetCurrent(current); }

CUresult cuCtxSetCurrent(CUcontext current) { return current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT; }

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return (void)limit, *value = 1 << 20, CUDA_SUCCESS; }

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }

/* Host memory stands for device memory, so that tensors need no GPU. */
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
  *(CUdeviceptr *)out = pointer;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const Elf64_Ehdr *head = image;
  struct text wrong = {{0}, 0};
  CHECK(!memcmp(head->e_ident, ELFMAG, SELFMAG) && head->e_machine == CUDA_CODE, "the image is not machine code");
  CHECK(!capturing, "loading code is not permitted while a stream is captured");
  *module = (CUmodule)image; /* Triton keeps the bytes alive until the functions are found */
  return wrong.length ? refuse("cuModuleLoadData", &wrong, CUDA_ERROR_INVALID_IMAGE) : CUDA_SUCCESS;
}

/* The most registers that the entries (format 4, attribute 0x2f: a symbol and its count) of a section .nv.info name. */
static int most_registers(const char *at, const char *end) {
  int most = 0;
  while (at + 4 <= end) {
    const unsigned char *entry = (const unsigned char *)at;
    const unsigned bytes = entry[0] == 4 ? entry[2] | entry[3] << 8 : 0; /* other formats have their value in place */
    if (entry[0] == 4 && entry[1] == 0x2f && bytes == 8) {
      int count;
      memcpy(&count, at + 8, sizeof count);
      most = count > most ? count : most;
    }
    at += 4 + bytes;
  }
  return most;
}

/* Reads registers and static shared memory of a kernel from the sections of its module; 0 = there is no such kernel. */
static int read_sections(const char *image, const char *name, struct function *into) {
  const Elf64_Ehdr *head = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + head->e_shoff);
  const char *names = image + sections[head->e_shstrndx].sh_offset;
  int there = 0, reserved = 0;
  for (int i = 0; i < head->e_shnum; i++) {
    const char *section = names + sections[i].sh_name, *bytes = image + sections[i].sh_offset;
    const int size = (int)sections[i].sh_size;
    if (!strcmp(section, ".nv.info")) into->registers = most_registers(bytes, bytes + size);
    if (!strncmp(section, ".text.", 6) && !strcmp(section + 6, name)) there = 1;
    if (!strncmp(section, ".nv.shared.", 11) && !strcmp(section + 11, name)) into->shared_static = size;
    if (!strncmp(section, ".nv.shared.reserved.", 20)) reserved = RESERVED;
  }
  /* From Hopper on a module counts the kilobyte that the system takes of every block; no block's limit includes it. */
  into->shared_static -= into->shared_static < reserved ? into->shared_static : reserved;
  return there;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  struct text wrong = {{0}, 0};
  struct function *made = calloc(1, sizeof *made);
  if (!made) return CUDA_ERROR_OUT_OF_MEMORY;
  snprintf(made->name, sizeof made->name, "%s", name);
  CHECK(read_sections((const char *)module, name, made), "the module has no kernel of this name");
  if (wrong.length) {
    free(made);
    return refuse(name, &wrong, CUDA_ERROR_NOT_FOUND);
  }
  /* A warp takes its registers in units of 256. */
  int of_a_warp = ((made->registers > 0 ? made->registers : 1) * 32 + 255) / 256 * 256;
  int fit = device.registers / of_a_warp * 32;
  made->max_threads = fit < THREADS ? fit : THREADS;
  made->shared_dynamic = SHARED_BEFORE_OPT_IN - made->shared_static;
  pthread_mutex_lock(&lock);
  made->next = functions;
  functions = made;
  pthread_mutex_unlock(&lock);
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  const struct function *f = (const struct function *)function;
  switch ((int)attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = f->registers; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = f->max_threads; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = f->shared_static; break;
  case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = f->shared_dynamic; break;
  default: *value = 0; /* spills are for bench/aot/sass.py to count */
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  struct function *f = (struct function *)function;
  struct text wrong = {{0}, 0};
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    CHECK(value >= 0 && value + f->shared_static <= device.shared_block,
          "cuFuncSetAttribute asks for %d bytes of dynamic shared memory beside %d static ones; a block has %d", value,
          f->shared_static, device.shared_block);
    if (!wrong.length) f->shared_dynamic = value;
  } else if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED) {
    f->wide_clusters = value;
  }
  return wrong.length ? refuse(f->name, &wrong, CUDA_ERROR_INVALID_VALUE) : CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return (void)function, (void)config, CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  (void)function, (void)config;
  *clusters = 1;
  return CUDA_SUCCESS;
}

/* ---- tensor maps ---- */

/* Bytes of an element; 0 = not a type. The packed types of CUDA 12.8 are not served: no kernel here has them. */
static int bytes_of(CUtensorMapDataType type) {
  switch ((int)type) {
  case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
  case CU_TENSOR_MAP_DATA_TYPE_UINT16:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
  case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
  case CU_TENSOR_MAP_DATA_TYPE_UINT32:
  case CU_TENSOR_MAP_DATA_TYPE_INT32:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
  case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
  case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ: return 4;
  case CU_TENSOR_MAP_DATA_TYPE_UINT64:
  case CU_TENSOR_MAP_DATA_TYPE_INT64:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
  default: return 0;
  }
}

static int floating(CUtensorMapDataType type) {
  return type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16 && type <= CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ;
}

/* The most bytes of a box's inner row; 0 = no limit. */
static unsigned span_of(CUtensorMapSwizzle swizzle) {
  return swizzle == CU_TENSOR_MAP_SWIZZLE_NONE   ? 0
         : swizzle == CU_TENSOR_MAP_SWIZZLE_32B  ? 32
         : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 64
                                                 : 128;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  struct text wrong = {{0}, 0}, who = {{0}, 0};
  const unsigned long long size = (unsigned long long)bytes_of(type);
  const size_t aligned = _Alignof(CUtensorMap);
  const unsigned unit = interleave == CU_TENSOR_MAP_INTERLEAVE_32B ? 32 : 16;
  maps++;
  if (device.major < 9) {
    CHECK(0, "compute capability %d.%d has no tensor maps", device.major, device.minor);
    return refuse("tensor map", &wrong, CUDA_ERROR_NOT_SUPPORTED);
  }
  CHECK(map && (size_t)map % aligned == 0, "the map is not at a multiple of %zu bytes", aligned);
  CHECK(size, "data type %d is unknown", (int)type);
  CHECK(address, "the address is null");
  CHECK((size_t)address % unit == 0, "the address is %zu bytes past a multiple of %u", (size_t)address % unit, unit);
  CHECK((unsigned)interleave <= CU_TENSOR_MAP_INTERLEAVE_32B, "interleave mode %d is unknown", (int)interleave);
  CHECK((unsigned)promotion <= CU_TENSOR_MAP_L2_PROMOTION_L2_256B, "L2 promotion %d is unknown", (int)promotion);
  CHECK((unsigned)fill <= CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA, "fill mode %d is unknown", (int)fill);
  CHECK(fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || floating(type), "NaN cannot fill data type %d", (int)type);
  CHECK(rank >= 1 && rank <= 5, "rank %u is outside 1..5", rank);
  CHECK(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE || rank >= 3, "interleaving needs rank 3, the rank is %u", rank);
  CHECK(interleave != CU_TENSOR_MAP_INTERLEAVE_32B || swizzle == CU_TENSOR_MAP_SWIZZLE_32B,
        "interleaving by 32 bytes needs the swizzle of 32 bytes");
  if (rank < 1 || rank > 5 || !size) return refuse("tensor map", &wrong, CUDA_ERROR_INVALID_VALUE);
  add(&who, "tensor map of");
  for (cuuint32_t i = rank; i-- > 0;) add(&who, " %llu", (unsigned long long)dims[i]);
  add(&who, " in boxes of");
  for (cuuint32_t i = rank; i-- > 0;) add(&who, " %u", box[i]);
  unsigned long long extent, block = size;
  for (cuuint32_t i = 0; i < rank; i++) {
    const unsigned long long dim = dims[i];
    CHECK(dim >= 1 && dim <= 1ull << 32, "size %llu of axis %u is outside 1..2^32", dim, i);
    CHECK(box[i] >= 1 && box[i] <= 256, "box size %u of axis %u is outside 1..256", box[i], i);
    CHECK((i == 0 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE) || (steps[i] >= 1 && steps[i] <= 8),
          "element stride %u of axis %u is outside 1..8", steps[i], i);
    block *= box[i];
    if (i + 1 == rank) break;
    extent = i == 0 ? size * dim : strides[i - 1] * dim;
    const unsigned long long stride = strides[i];
    CHECK(stride % unit == 0, "stride %llu bytes of axis %u is not a multiple of %u", stride, i + 1, unit);
    CHECK(stride < 1ull << 40, "stride %llu bytes of axis %u is not below 2^40", stride, i + 1);
    CHECK(stride >= extent, "stride %llu bytes of axis %u is less than the %llu it steps over", stride, i + 1, extent);
  }
  const unsigned long long inner = box[0] * size;
  const unsigned span = span_of(swizzle);
  CHECK((unsigned)swizzle <= CU_TENSOR_MAP_SWIZZLE_128B + 3, "swizzle %d is unknown", (int)swizzle);
  if (interleave == CU_TENSOR_MAP_INTERLEAVE_NONE) {
    CHECK(inner % 16 == 0, "the box's inner row of %llu bytes is not a multiple of 16", inner);
    CHECK(!span || inner <= span, "the box's inner row of %llu bytes is wider than the swizzle of %u", inner, span);
  }
  CHECK(block <= (unsigned)device.shared_block, "a box of %llu bytes does not fit the %d of shared memory", block,
        device.shared_block);
  if (map) memset(map, 0, sizeof *map);
  return wrong.length ? refuse(who.at, &wrong, CUDA_ERROR_INVALID_VALUE) : CUDA_SUCCESS;
}

/* ---- launches ---- */

static void check_cluster(struct text *into, const CUlaunchConfig *config, const struct function *f) {
  struct text wrong = {{0}, 0};
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const CUlaunchAttribute *attribute = &config->attrs[i];
    if (attribute->id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
    const unsigned x = attribute->value.clusterDim.x, y = attribute->value.clusterDim.y;
    const unsigned z = attribute->value.clusterDim.z, most = f->wide_clusters ? 16 : 8;
    CHECK(device.major >= 9, "compute capability %d.%d has no clusters", device.major, device.minor);
    CHECK(x && y && z && x <= most && y <= most && z <= most && x * y * z <= most,
          "a cluster of %u x %u x %u is outside 1..%u", x, y, z, most);
    CHECK(!x || !y || !z || (config->gridDimX % x == 0 && config->gridDimY % y == 0 && config->gridDimZ % z == 0),
          "the grid is not a multiple of the cluster %u x %u x %u", x, y, z);
  }
  if (wrong.length) add(into, "%s%s", into->length ? "; " : "", wrong.at);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  struct function *f = (struct function *)function;
  struct text wrong = {{0}, 0};
  const unsigned x = config->gridDimX, y = config->gridDimY, z = config->gridDimZ;
  const unsigned long long threads = (unsigned long long)config->blockDimX * config->blockDimY * config->blockDimZ;
  launches++;
  f->launches++;
  CHECK(x >= 1 && x <= 2147483647u, "grid of %u along x is outside 1..2^31-1", x);
  CHECK(y >= 1 && y <= 65535, "grid of %u along y is outside 1..65535", y);
  CHECK(z >= 1 && z <= 65535, "grid of %u along z is outside 1..65535", z);
  CHECK(threads >= 1 && threads <= THREADS && config->blockDimZ <= 64, "%llu threads a block are outside 1..%d (z: 64)",
        threads, THREADS);
  CHECK(threads <= (unsigned)f->max_threads, "%llu threads a block with %d registers each; the registers allow %d",
        threads, f->registers, f->max_threads);
  CHECK(config->sharedMemBytes <= (unsigned)f->shared_dynamic,
        "%u bytes of dynamic shared memory; the function was given %d", config->sharedMemBytes, f->shared_dynamic);
  CHECK((unsigned long long)config->sharedMemBytes + (unsigned)f->shared_static <= (unsigned)device.shared_block,
        "%u bytes of shared memory and %d static ones; a block has %d", config->sharedMemBytes, f->shared_static,
        device.shared_block);
  CHECK(!config->numAttrs || config->attrs, "%u attributes at a null address", config->numAttrs);
  CHECK(params || extra, "no arguments were given");
  if (config->attrs) check_cluster(&wrong, config, f);
  return wrong.length ? refuse(f->name, &wrong, CUDA_ERROR_INVALID_VALUE) : CUDA_SUCCESS;
}
