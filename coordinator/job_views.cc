#include "coordinator/job_views.h"

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "coordinator/job_state.h"

namespace simpo {
namespace {

absl::Status Ambiguous(const std::string& reference, const std::vector<JobViews::View>& found) {
  constexpr size_t kShown = 5;
  std::vector<std::string> shown;
  for (auto view = found.rbegin(); view != found.rend() && shown.size() < kShown; ++view) {
    shown.push_back(absl::StrCat((*view)->job.id(), " (", JobStateName((*view)->job.state()), ")"));
  }
  return absl::FailedPreconditionError(absl::StrCat("'", reference, "' stands for ", found.size(),
                                                    " jobs; say which by its id: ", absl::StrJoin(shown, ", "),
                                                    found.size() > kShown ? ", ..." : ""));
}

}  // namespace

void JobViews::Publish(std::vector<View> views) {
  if (views.empty()) return;
  {
    const std::lock_guard lock(mutex_);
    for (View& view : views) {
      View& place = by_sequence_[view->sequence];
      if (!place) {
        by_id_[view->job.id()] = view->sequence;
        by_request_id_[view->job.request_id()] = view->sequence;
      }
      place = std::move(view);
    }
  }
  if (listener_) listener_();
}

void JobViews::Remove(int64_t sequence) {
  const std::lock_guard lock(mutex_);
  const auto found = by_sequence_.find(sequence);
  if (found == by_sequence_.end()) return;
  by_id_.erase(found->second->job.id());
  by_request_id_.erase(found->second->job.request_id());
  by_sequence_.erase(found);
}

absl::StatusOr<JobViews::View> JobViews::Find(const std::string& reference) const {
  if (reference.empty()) return absl::InvalidArgumentError("job_id is empty; give a job's id or name");
  const std::lock_guard lock(mutex_);
  if (const auto exact = by_id_.find(reference); exact != by_id_.end()) return by_sequence_.at(exact->second);
  std::vector<View> found;
  for (const auto& [sequence, view] : by_sequence_) {
    if (view->job.name() == reference) found.push_back(view);
  }
  if (found.empty()) {
    for (auto id = by_id_.lower_bound(reference); id != by_id_.end() && absl::StartsWith(id->first, reference); ++id) {
      found.push_back(by_sequence_.at(id->second));
    }
  }
  if (found.size() == 1) return found[0];
  if (!found.empty()) return Ambiguous(reference, found);
  return absl::NotFoundError(absl::StrCat("there is no job '", reference, "'; `simpoctl list` shows all"));
}

JobViews::View JobViews::FindById(const std::string& id) const {
  const std::lock_guard lock(mutex_);
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : by_sequence_.at(found->second);
}

JobViews::View JobViews::FindByRequestId(const std::string& request_id) const {
  const std::lock_guard lock(mutex_);
  const auto found = by_request_id_.find(request_id);
  return found == by_request_id_.end() ? nullptr : by_sequence_.at(found->second);
}

std::vector<JobViews::View> JobViews::All() const {
  const std::lock_guard lock(mutex_);
  std::vector<View> all;
  all.reserve(by_sequence_.size());
  for (const auto& [sequence, view] : by_sequence_) all.push_back(view);
  return all;
}

}  // namespace simpo
