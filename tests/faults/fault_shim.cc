// Loaded before a program's libraries (LD_PRELOAD), it sets the calendar's clock and slows the disk down as the file
// that SIMPO_FAULT_FILE names says: two 64-bit numbers, how far the clock is ahead and how long a sync of a database
// takes, in milliseconds. The file may change at any time. The clock that never jumps stays as it is.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

namespace {

struct Faults {
  volatile int64_t clock_ahead_ms;
  volatile int64_t sync_ms;
};

const Faults* Read() {
  static const Faults* const faults = [] {
    static const Faults none = {};
    const char* path = getenv("SIMPO_FAULT_FILE");
    const int fd = path == nullptr ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return &none;
    const void* mapped = mmap(nullptr, sizeof(Faults), PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    return mapped == MAP_FAILED ? &none : static_cast<const Faults*>(mapped);
  }();
  return faults;
}

constexpr int64_t kSecond = 1'000'000'000;

int64_t Nanos(const timespec& time) { return int64_t{time.tv_sec} * kSecond + time.tv_nsec; }
timespec Time(int64_t nanos) { return {.tv_sec = nanos / kSecond, .tv_nsec = nanos % kSecond}; }

// `syscall` of the C library, which this file replaces.
long Call(long number, long a, long b, long c, long d = 0, long e = 0, long f = 0) {
  static const auto real = reinterpret_cast<long (*)(long, ...)>(dlsym(RTLD_NEXT, "syscall"));
  return real(number, a, b, c, d, e, f);
}

int Now(clockid_t clock, timespec* time) {
  const int result = static_cast<int>(Call(SYS_clock_gettime, clock, reinterpret_cast<long>(time), 0));
  if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
    *time = Time(Nanos(*time) + Read()->clock_ahead_ms * 1'000'000);
  }
  return result;
}

void WaitForDisk(int fd) {
  const int64_t ms = Read()->sync_ms;
  if (ms <= 0) return;
  char link[64], path[4096];
  snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof(path) - 1);
  if (length <= 0) return;
  path[length] = '\0';
  if (strstr(path, ".db") != nullptr) usleep(static_cast<useconds_t>(ms * 1000));
}

}  // namespace

extern "C" {

int clock_gettime(clockid_t clock, timespec* time) { return Now(clock, time); }

int gettimeofday(timeval* time, void*) {
  timespec now;
  Now(CLOCK_REALTIME, &now);
  time->tv_sec = now.tv_sec;
  time->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t* result) {
  timespec now;
  Now(CLOCK_REALTIME, &now);
  if (result != nullptr) *result = now.tv_sec;
  return now.tv_sec;
}

// Who waits for a time of the calendar waits by the clock as it is set, also when it is set meanwhile.
long syscall(long number, ...) {
  va_list list;
  va_start(list, number);
  long a[6];
  for (long& argument : a) argument = va_arg(list, long);
  va_end(list);
  const auto* until = reinterpret_cast<const timespec*>(a[3]);
  if (number != SYS_futex || (a[1] & FUTEX_CLOCK_REALTIME) == 0 || until == nullptr) {
    return Call(number, a[0], a[1], a[2], a[3], a[4], a[5]);
  }
  while (true) {
    timespec now, steady;
    Now(CLOCK_REALTIME, &now);
    const int64_t left = Nanos(*until) - Nanos(now);
    if (left <= 0) {
      errno = ETIMEDOUT;
      return -1;
    }
    Now(CLOCK_MONOTONIC, &steady);
    const timespec piece = Time(Nanos(steady) + (left < kSecond / 10 ? left : kSecond / 10));
    const long result =
        Call(number, a[0], a[1] & ~FUTEX_CLOCK_REALTIME, a[2], reinterpret_cast<long>(&piece), a[4], a[5]);
    if (result == 0 || errno != ETIMEDOUT) return result;
  }
}

int fsync(int fd) {
  WaitForDisk(fd);
  return static_cast<int>(Call(SYS_fsync, fd, 0, 0));
}

int fdatasync(int fd) {
  WaitForDisk(fd);
  return static_cast<int>(Call(SYS_fdatasync, fd, 0, 0));
}

}  // extern "C"
