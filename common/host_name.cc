#include "common/host_name.h"

#include <unistd.h>

namespace simpo {

std::string HostName() {
  char name[256] = "";
  gethostname(name, sizeof(name) - 1);
  return name;
}

}  // namespace simpo
