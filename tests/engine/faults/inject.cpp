// Preloaded into a process, this counts what it does to files below one directory, and at the n-th
// such operation kills it, or lets that one and those after it fail. It stands below Python and all
// libraries: whoever writes, writes through the C library.
//
//   INJECT_UNDER  the directory; nothing is done while it is unset
//   INJECT_LOG    file outside of it that gets a line an operation
//   INJECT_AT     number of the operation, from 1; 0 only counts
//   INJECT_HOW    "kill": before it; "torn": after half of it, where it writes bytes; else an errno
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <string>

namespace {

long counted = 0;

template <typename F>
F real(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

std::string path_of(int descriptor) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t size = readlink(link, path, sizeof path - 1);
  return size > 0 ? std::string(path, size) : std::string();
}

std::string path_at(int directory, const char* path) {
  if (path == nullptr) return {};
  if (path[0] == '/') return path;
  if (directory != AT_FDCWD) return path_of(directory) + "/" + path;
  char here[4096];
  return getcwd(here, sizeof here) ? std::string(here) + "/" + path : std::string(path);
}

// Returns the errno to fail with, 0 to go on, or -1 to write half and die.
int happens(const char* operation, const std::string& path, bool removes = false) {
  const char* under = getenv("INJECT_UNDER");
  if (under == nullptr || path.compare(0, strlen(under), under) != 0) return 0;
  ++counted;
  if (const char* log = getenv("INJECT_LOG")) {
    int file = real<int (*)(const char*, int, ...)>("open")(log, O_WRONLY | O_APPEND | O_CREAT, 0600);
    std::string line = std::to_string(counted) + " " + operation + " " + path + "\n";
    (void)!real<ssize_t (*)(int, const void*, size_t)>("write")(file, line.data(), line.size());
    close(file);
  }
  long at = atol(getenv("INJECT_AT"));
  const char* how = getenv("INJECT_HOW");
  if (at == 0) return 0;
  if (strcmp(how, "kill") == 0 || strcmp(how, "torn") == 0) {
    if (counted < at) return 0;
    if (strcmp(how, "torn") == 0 && strcmp(operation, "write") == 0) return -1;
    kill(getpid(), SIGKILL);
    pause();
  }
  int number = atoi(how);
  // a full disk lets files be removed, and one that is read-only nothing at all
  if (counted < at || (removes && number != EROFS && number != EACCES)) return 0;
  // what is open may be written to on, whatever the permissions have become
  bool open_already = strcmp(operation, "write") == 0 || strcmp(operation, "fsync") == 0 ||
                      strcmp(operation, "truncate") == 0;
  if (open_already && number == EACCES) return 0;
  if (number == EFBIG && strcmp(operation, "write") != 0) return 0;
  return number;
}

template <typename R, typename F>
R guarded(int number, F go) {
  if (number > 0) {
    errno = number;
    return static_cast<R>(-1);
  }
  return go();
}

bool writes(int flags) { return (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) != 0; }

}  // namespace

extern "C" {

#define OPEN(name)                                                                       \
  int name(const char* path, int flags, ...) {                                           \
    va_list rest;                                                                        \
    va_start(rest, flags);                                                               \
    mode_t mode = va_arg(rest, mode_t);                                                  \
    va_end(rest);                                                                        \
    int fault = writes(flags) ? happens("open", path_at(AT_FDCWD, path)) : 0;            \
    return guarded<int>(                                                                 \
        fault, [&] { return real<int (*)(const char*, int, ...)>(#name)(path, flags, mode); }); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                          \
  int name(int at, const char* path, int flags, ...) {                                        \
    va_list rest;                                                                             \
    va_start(rest, flags);                                                                    \
    mode_t mode = va_arg(rest, mode_t);                                                       \
    va_end(rest);                                                                             \
    int fault = writes(flags) ? happens("open", path_at(at, path)) : 0;                       \
    return guarded<int>(fault, [&] {                                                          \
      return real<int (*)(int, const char*, int, ...)>(#name)(at, path, flags, mode);         \
    });                                                                                       \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void* data, size_t size) {
  auto go = real<ssize_t (*)(int, const void*, size_t)>("write");
  int fault = file > 2 ? happens("write", path_of(file)) : 0;
  if (fault == -1) {
    (void)!go(file, data, size / 2);
    kill(getpid(), SIGKILL);
    pause();
  }
  return guarded<ssize_t>(fault, [&] { return go(file, data, size); });
}

#define PWRITE(name)                                                                         \
  ssize_t name(int file, const void* data, size_t size, off_t offset) {                      \
    return guarded<ssize_t>(happens("pwrite", path_of(file)), [&] {                          \
      return real<ssize_t (*)(int, const void*, size_t, off_t)>(#name)(file, data, size, offset); \
    });                                                                                      \
  }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int file, const struct iovec* parts, int count) {
  return guarded<ssize_t>(happens("writev", path_of(file)), [&] {
    return real<ssize_t (*)(int, const struct iovec*, int)>("writev")(file, parts, count);
  });
}

#define OF_FILE(name, operation)                                          \
  int name(int file) {                                                    \
    return guarded<int>(happens(operation, path_of(file)),                \
                        [&] { return real<int (*)(int)>(#name)(file); }); \
  }
OF_FILE(fsync, "fsync")
OF_FILE(fdatasync, "fsync")

#define TRUNCATE(name)                                                                       \
  int name(int file, off_t size) {                                                           \
    return guarded<int>(happens("truncate", path_of(file)),                                  \
                        [&] { return real<int (*)(int, off_t)>(#name)(file, size); });       \
  }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

int rename(const char* from, const char* to) {
  return guarded<int>(happens("rename", path_at(AT_FDCWD, to)), [&] {
    return real<int (*)(const char*, const char*)>("rename")(from, to);
  });
}

int renameat(int a, const char* from, int b, const char* to) {
  return guarded<int>(happens("rename", path_at(b, to)), [&] {
    return real<int (*)(int, const char*, int, const char*)>("renameat")(a, from, b, to);
  });
}

int mkdir(const char* path, mode_t mode) {
  return guarded<int>(happens("mkdir", path_at(AT_FDCWD, path)),
                      [&] { return real<int (*)(const char*, mode_t)>("mkdir")(path, mode); });
}

int unlink(const char* path) {
  return guarded<int>(happens("unlink", path_at(AT_FDCWD, path), true),
                      [&] { return real<int (*)(const char*)>("unlink")(path); });
}

int unlinkat(int at, const char* path, int flags) {
  return guarded<int>(happens("unlink", path_at(at, path), true), [&] {
    return real<int (*)(int, const char*, int)>("unlinkat")(at, path, flags);
  });
}

int rmdir(const char* path) {
  return guarded<int>(happens("rmdir", path_at(AT_FDCWD, path), true),
                      [&] { return real<int (*)(const char*)>("rmdir")(path); });
}

int symlink(const char* target, const char* path) {
  return guarded<int>(happens("symlink", path_at(AT_FDCWD, path)), [&] {
    return real<int (*)(const char*, const char*)>("symlink")(target, path);
  });
}

}  // extern "C"
