// How long each step of a run is planned to take, for the step line and the metrics: the very chunks of the step, whole
// windows or packed documents, under the schedule of the run, on the machine as it is described. Called by the training
// loop of rank 0.
#pragma once

#include "llmc/parallel/planned_step.h"
#include "llmc/pipeline/step.h"

// What the chunks of a step have to do. Where documents share a chunk, attention is as efficient as at the mean of
// their lengths, each counted by its work.
inline std::vector<ChunkWork> chunk_works(const GptConfig& g, const Step& step, const std::vector<ChunkShape>& shapes) {
    std::vector<ChunkWork> works;
    for (size_t c = 0; c < step.chunks.size(); ++c) {
        double all = 0, lengths = 0;
        for (const SegmentRows& segment : step.segments[c]) {
            const double work = attention_flops(g, segment.context, segment.context + segment.length);
            all += work, lengths += work * double(2 * segment.context + segment.length);
        }
        works.push_back({int64_t(step.chunks[c].tokens.size()), std::llround(lengths / all),
                         all / (3 * double(g.layers)), shapes[c].store >= 0, shapes[c].first_slice,
                         shapes[c].last_slice});
    }
    return works;
}

class PlannedRun {
public:
    PlannedRun(const Cluster& cluster, const RankOptions& options) : cluster_(cluster), options_(options) {}

    double step_ms(const Step& step) {
        std::vector<ChunkShape> shapes = chunk_shapes(step.group_sizes, options_.chunk_tokens, options_.model.context);
        std::vector<ChunkWork> works = chunk_works(options_.model, step, shapes);
        if (works == works_) return step_ms_;         // windows: all steps are alike
        if (planned_.size() > 256) planned_.clear();  // as Rank::plan_for does
        const auto [place, is_new] = planned_.try_emplace(step.group_sizes, std::move(shapes), options_);
        const PlannedStep& planned = place->second;
        if (is_new) update_ms_ = update_ms(cluster_, planned);
        works_ = std::move(works);
        return step_ms_ = simulate_with(planned.costs(cluster_, works_), planned).makespan + update_ms_;
    }

private:
    Cluster cluster_;
    RankOptions options_;
    std::map<std::vector<int>, PlannedStep> planned_;  // [group sizes]
    std::vector<ChunkWork> works_;                     // of the step before,
    double step_ms_ = 0;                               // and its time
    double update_ms_ = 0;                             // the same for all steps
};
