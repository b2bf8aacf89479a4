#ifndef SIMPO_COMMON_HOST_NAME_H_
#define SIMPO_COMMON_HOST_NAME_H_

#include <string>

namespace simpo {

// This machine's name; empty when it has none.
std::string HostName();

}  // namespace simpo

#endif  // SIMPO_COMMON_HOST_NAME_H_
