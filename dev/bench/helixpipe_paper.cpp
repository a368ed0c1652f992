// The evaluation of the HelixPipe paper (arXiv 2507.00394), simulated on dev/clusters/h20x64.toml: models of 1.3B, 3B
// and 7B, 32k to 128k tokens, 2, 4 and 8 pipeline ranks of 8 GPUs; first the schedule as published against its rivals,
// then ours, at the memory of 1F1B's first stage (`fast`) and at 30 % of it (`lean`). All are planned by the same
// lists, costs and arenas; at a given memory each takes its best recompute mode, partial recomputation among them.
//
//   build/bench/helixpipe_paper [--json] [--rehearse]
//
// Memory is what counts for a schedule: the largest arena of a rank (bf16: kept activations, receive buffers, shipped
// weights, gradient accumulators) and the workspace, without weights, gradients and moments. The gather buffers of
// tensor parallelism, alike for all schedules, are left out.
#define TESTING
#include "train_gpt.cu"

#include "llmc/commands/rehearse.h"

// ---------------------------------------------------------------------------------------------------------------------
// What is compared

struct Case {
    std::string model = "7B";
    int64_t context = 131072;
    int p = 8, m = 16;

    std::string name() const {
        return model + " s=" + tokens_text(context) + " p=" + std::to_string(p) + " m=" + std::to_string(m);
    }
    RankOptions options() const {
        const Preset& sizes = *find_preset(model == "7B"   ? "helixpipe:7b"
                                           : model == "3B" ? "helixpipe:3b"
                                                           : "helixpipe:1.3b");
        RankOptions o;
        o.model = {sizes.layers, sizes.channels, sizes.heads, context, 50257, 50304, true};
        o.chunk_tokens = context;
        o.mlp_chunk = 4096, o.head_chunk = 1024;
        o.layout.ranks = p;
        return o;
    }
};

constexpr HelixOptions as_published = HelixOptions::published();
constexpr int row_pieces = 8;

// A step in one recompute mode, simulated.
struct Outcome {
    std::string name, mode;
    double ms = INFINITY, without_head = INFINITY;  // the second: the same plan, the head for nothing
    double gb = 0;                                  // of a device of the rank that needs most
    double busiest = 0;                             // ms of the busiest rank
    RankOptions options = {};                       // with what is planned again, to be rehearsed
    double limit = 0;

    bool fits(double limit) const { return gb <= limit; }
};

bool faster(const Outcome& a, const Outcome& b) { return a.ms < b.ms; }

Outcome outcome_of(const Cluster& cluster, const PlannedStep& step, const std::string& name, const std::string& mode) {
    Outcome outcome{name, mode};
    const OpCosts costs = step.costs(cluster);
    const auto message_ms = [&](const Op& send, int rank) { return costs.message_ms(send, rank); };
    const Timeline timeline = simulate(step.lists, step.input, costs, message_ms);
    const auto headless = [&](const Op& op) { return op.part == Part::head ? 0 : costs(op); };
    outcome.ms = timeline.makespan;
    outcome.without_head = simulate(step.lists, step.input, headless, message_ms).makespan;
    outcome.busiest = *std::max_element(timeline.busy.begin(), timeline.busy.end());
    const RankOptions& o = step.options;
    const int64_t workspace = step.sizes.workspace(o.chunk_tokens, o.model, o.mlp_chunk, o.head_chunk);
    int64_t arena = 0;  // of the rank that needs most
    for (int r = 0; r < step.input.ranks; ++r) arena = std::max(arena, step.plan_of(r, arena).size.bytes);
    outcome.gb = 1e-9 * double(arena + workspace) / cluster.tp;
    return outcome;
}

// The step of a layout; recompute `automatic` keeps what fits into `limit` GB of a device.
PlannedStep planned(const Cluster& cluster, const RankOptions& o, int m, double limit = 0) {
    const ElementSizes sizes = element_sizes(cluster.precision);
    RankOptions cut = o;
    chunks_of_step(cut, m);
    const int64_t workspace = sizes.workspace(cut.chunk_tokens, o.model, o.mlp_chunk, o.head_chunk);
    return PlannedStep(o, m, sizes, [&](int) { return int64_t(1e9 * limit * cluster.tp) - workspace; });
}

// A layout, in all modes.
struct Entrant {
    std::string name;
    RankOptions options;
    int m;
    std::vector<Outcome> modes;

    Entrant(const Cluster& cluster, std::string name, RankOptions o, int m,
            std::vector<Recompute> tried = {Recompute::none, Recompute::elementwise, Recompute::without_attention})
        : name(std::move(name)), options(std::move(o)), m(m) {
        options.recompute = Recompute::without_attention;
        PlannedStep step = planned(cluster, options, m);
        for (Recompute mode : tried) {
            step.options.recompute = mode;
            modes.push_back(outcome_of(cluster, step, this->name, recompute_names[int(mode)]));
            modes.back().options = options, modes.back().options.recompute = mode;
        }
    }
    Outcome keeping(const Cluster& cluster, double limit) const {
        RankOptions o = options;
        o.recompute = Recompute::automatic;
        const PlannedStep step = planned(cluster, o, m, limit);
        int kept = 0, all = 0;
        for (const std::vector<Op>& list : step.lists)
            for (const Op& op : list)
                if (op.kind == Kind::compute && op.pass == Pass::B &&
                    (op.part == Part::post || op.part == Part::attention))
                    ++all, kept += op.keeps;
        Outcome outcome = outcome_of(cluster, step, name, format("keeps %d/%d", kept, all));
        outcome.options = o, outcome.limit = limit;
        return outcome;
    }
    const Outcome& in(Recompute mode) const {
        return *std::find_if(modes.begin(), modes.end(),
                             [&](const Outcome& o) { return o.mode == recompute_names[int(mode)]; });
    }
    // The fastest within so many GB; infinitely slow if nothing fits. What is partly recomputed lies between the two
    // modes, and is looked at only if it may be faster than `than`.
    Outcome best(const Cluster& cluster, double limit, double than = INFINITY) const {
        Outcome found{name, "-"};
        for (const Outcome& mode : modes)
            if (mode.fits(limit) && faster(mode, found)) found = mode;
        const Outcome &all = in(Recompute::without_attention), &least = in(Recompute::elementwise);
        if (!all.fits(limit) || least.fits(limit) || least.ms >= std::min(found.ms, than)) return found;
        const Outcome partial = keeping(cluster, limit);
        return partial.fits(limit) && faster(partial, found) ? partial : found;
    }
};

// All schedules on one case.
struct Contest {
    Case at;
    Cluster cluster;
    std::vector<Entrant> rivals, sliced, ours;  // rivals: without slices; the first one is 1F1B, the second ZB-H1
    std::vector<Outcome> published;             // one fold, two folds
    double bound = 0, bound_without_head = 0;   // ms: the work without recomputation, spread evenly
    double chain = 0;                           // ms of one chunk, one op after the other,
    double ramp = 0;                            // and of one turn of helix, by its closed form

    Contest(const Case& at, const Cluster& cluster) : at(at), cluster(cluster) {
        const int p = at.p, L = int(at.options().model.layers), most = int(ceil_div(L, p));
        const auto layout = [&](const std::string& schedule) {
            RankOptions o = at.options();
            o.layout.schedule = schedule;
            return o;
        };
        const auto add = [&](std::vector<Entrant>& list, const std::string& name, const RankOptions& o) {
            list.emplace_back(cluster, name, o, at.m);
        };
        for (const char* name : {"1f1b", "zb-h1", "zb-h2"}) add(rivals, name, layout(name));
        for (int v = 2; v <= most; ++v) {
            if (L % (p * v) && v != most) continue;
            RankOptions o = layout("interleaved");
            o.layout.virtual_stages = v;
            add(rivals, "interleaved-v" + std::to_string(v), o);
        }
        add(sliced, "seq1f1b", layout("seq1f1b"));
        for (int folds : {1, 2}) {
            RankOptions o = layout("helix");
            o.layout.folds = folds;
            if (folds == 1) o.layout.row_pieces = row_pieces;  // they do what the second fold does
            for (int round : {0, p, 2 * p, 4 * p})
                for (int deferred : {0, 8, 14}) {  // weight gradients: ranks idle enough between rounds alone
                    if (round >= at.m || round % (folds * p) || (deferred && !round)) continue;
                    o.layout.round_chunks = round, o.layout.deferred = deferred;
                    add(ours,
                        format("helix F=%d", folds) + (round ? format(" rounds of %d", round) : "") +
                            (deferred ? format(" deferred %d", deferred) : ""),
                        o);
                }
            o.layout.round_chunks = o.layout.deferred = 0, o.layout.row_pieces = 1, o.layout.helix = as_published;
            published.push_back(
                Entrant(cluster, format("published F=%d", folds), o, at.m, {Recompute::without_attention}).modes[0]);
        }
        RankOptions one = at.options();
        one.layout.ranks = 1;
        const PlannedStep step = planned(cluster, one, 1);
        const OpCosts costs = step.costs(cluster);
        for (const Op& op : step.lists[0]) {
            chain += costs(op);
            if (op.part == Part::post && op.layer == 0) ramp += (p - 1) * costs(op);
            bound_without_head += op.part == Part::head ? 0 : costs(op) * at.m / p;
        }
        bound = chain * at.m / p;
    }

    const Outcome& one_f_one_b() const { return rivals[0].in(Recompute::none); }
    // Memory-capped, as ZB1P: within that of 1F1B's first stage.
    Outcome zb1p() const { return rivals[1].best(cluster, one_f_one_b().gb); }

    Outcome best(const std::vector<Entrant>& entrants, double limit) const {
        Outcome found{"none fits", "-"};
        for (const Entrant& entrant : entrants)
            if (const Outcome one = entrant.best(cluster, limit, found.ms); faster(one, found)) found = one;
        return found;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Results of a case

// At one memory.
struct Point {
    std::string name;
    double limit = 0;  // GB
    Outcome ours, seq1f1b;
    std::vector<Outcome> rivals = {};  // those that fit

    const Outcome& best() const { return *std::min_element(rivals.begin(), rivals.end(), faster); }
    Outcome best_named(const std::string& name) const {
        Outcome found{name, "-"};
        for (const Outcome& rival : rivals)
            if (rival.name.starts_with(name) && faster(rival, found)) found = rival;
        return found;
    }
};

struct Result {
    Case at;
    double bound, bound_without_head, chain, ramp;
    Outcome one_f_one_b, mlp_rebuilt, zb1p;
    std::vector<Outcome> alone;  // rivals by themselves, in the fastest mode at any memory
    std::vector<Outcome> published;
    Point fast, lean;

    explicit Result(const Contest& c)
        : at(c.at),
          bound(c.bound),
          bound_without_head(c.bound_without_head),
          chain(c.chain),
          ramp(c.ramp),
          one_f_one_b(c.one_f_one_b()),
          mlp_rebuilt(c.rivals[0].in(Recompute::elementwise)),
          zb1p(c.zb1p()),
          published(c.published) {
        for (const std::vector<Entrant>* list : {&c.rivals, &c.sliced})
            for (const Entrant& entrant : *list) alone.push_back(entrant.in(Recompute::none));
        for (Point* point : {&fast, &lean}) {
            point->name = point == &fast ? "fast" : "lean";
            point->limit = one_f_one_b.gb * (point == &fast ? 1 : 0.3);
            point->ours = c.best(c.ours, point->limit);
            point->seq1f1b = c.sliced[0].best(c.cluster, point->limit);
            for (const Entrant& rival : c.rivals)
                if (const Outcome one = rival.best(c.cluster, point->limit); one.ms < INFINITY)
                    point->rivals.push_back(one);
        }
    }
    const Outcome& rival_of_published() const { return faster(zb1p, one_f_one_b) ? zb1p : one_f_one_b; }
    // How far the plan is above what no plan of these ops can pass.
    double gap() const { return fast.ours.ms / std::max(fast.ours.busiest, chain); }
};

// ---------------------------------------------------------------------------------------------------------------------
// Questions about 7B, 128k, 8 ranks, 16 chunks

// The published comparison under other rates and links.
struct Change {
    std::string what;
    Outcome one_f_one_b, zb1p, published;
};

std::vector<Change> changes_of_rates(const Contest& contest) {
    std::vector<std::pair<std::string, Cluster>> changed = with_other_rates(contest.cluster);
    for (double bandwidth : {12.5, 25.0, 50.0}) {
        changed.emplace_back(format("links of %.4g GB/s", bandwidth), contest.cluster);
        changed.back().second.between.bandwidth = bandwidth;
    }
    RankOptions o = contest.at.options();
    o.layout.schedule = "helix", o.layout.helix = as_published;
    std::vector<Change> all(changed.size());
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < changed.size(); ++i) {
        const auto& [what, cluster] = changed[i];
        const auto entrant = [&](const char* schedule) {
            RankOptions rival = contest.at.options();
            rival.layout.schedule = schedule;
            return Entrant(cluster, schedule, rival, contest.at.m);
        };
        const Outcome reference = entrant("1f1b").in(Recompute::none);
        all[i] = {what, reference, entrant("zb-h1").best(cluster, reference.gb),
                  Entrant(cluster, "published F=2", o, contest.at.m, {Recompute::without_attention}).modes[0]};
    }
    return all;
}

// From the published schedule to ours: each improvement alone, and all up to it.
struct Ablation {
    std::string improvement;
    Outcome alone, together;  // infinitely slow where it cannot stand alone
};

std::vector<Ablation> ablation(const Contest& contest) {
    const Cluster& cluster = contest.cluster;
    const double limit = contest.one_f_one_b().gb;
    const auto run = [&](HelixOptions helix, int folds = 2, int pieces = 1, int round = 0, int deferred = 0) {
        RankOptions o = contest.at.options();
        o.layout.deferred = deferred, o.layout.row_pieces = pieces;
        o.layout.schedule = "helix", o.layout.helix = helix, o.layout.folds = folds, o.layout.round_chunks = round;
        return Entrant(cluster, "helix", o, contest.at.m, {Recompute::without_attention});
    };
    const auto kept = [&](const Entrant& entrant) { return entrant.keeping(cluster, limit); };
    const Outcome published = contest.published[1], none{};
    const int p = contest.at.p;
    return {{"as published, two folds", published, published},
            {"weights once a step", run({true, true, false, false}).modes[0], run({true, true, false, false}).modes[0]},
            {"LayerNorm moved, too", run({true, false, true, false}).modes[0], run({true, true, true, false}).modes[0]},
            {"head spread", run({true, false, false, true}).modes[0], run({true, true, true, true}).modes[0]},
            {"keeps what fits into 1F1B's memory", none, kept(run({}))},  // needs the LayerNorm's move
            {"one fold", contest.published[0], kept(run({}, 1))},
            {format("one fold, %d row pieces", row_pieces), run(as_published, 1, row_pieces).modes[0],
             kept(run({}, 1, row_pieces))},
            {format("the same in rounds of %d", p), run(as_published, 1, row_pieces, p).modes[0],
             kept(run({}, 1, row_pieces, p))},
            {"the same, up to 14 weight gradients deferred", run(as_published, 1, row_pieces, p, 14).modes[0],
             kept(run({}, 1, row_pieces, p, 14))}};
}

struct CurvePoint {
    int percent;  // of the memory of 1F1B's first stage
    Outcome ours, rival, seq1f1b;
};

std::vector<CurvePoint> curve_of(const Contest& contest) {
    std::vector<CurvePoint> curve;
    for (int percent : {15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100}) curve.push_back({percent, {}, {}, {}});
#pragma omp parallel for schedule(dynamic)
    for (CurvePoint& point : curve) {
        const double limit = 0.01 * point.percent * contest.one_f_one_b().gb;
        point.ours = contest.best(contest.ours, limit);
        point.rival = contest.best(contest.rivals, limit);
        point.seq1f1b = contest.best(contest.sliced, limit);
    }
    return curve;
}

// ---------------------------------------------------------------------------------------------------------------------
// Goals

struct Goal {
    std::string what;
    double value, goal;
    bool at_most = false;

    bool met() const { return at_most ? value <= goal : value >= goal; }
};

// `links`: of the cases in `results` at 7B, 128k, 8 ranks.
void add_point_goals(std::vector<Goal>& goals, const Result& r, const std::string& links) {
    const auto add = [&](const Point& point, const std::string& against, const Outcome& reference, double goal) {
        goals.push_back(
            {format("%s, m = %d, %s, against %s", point.name.c_str(), r.at.m, links.c_str(), against.c_str()),
             reference.ms / point.ours.ms, goal});
    };
    if (r.at.m == 2 * r.at.p) {
        add(r.lean, "1F1B", r.one_f_one_b, 1.34);
        add(r.lean, "the best without slicing (" + r.lean.best().name + ")", r.lean.best(), 1.07);
        add(r.fast, "1F1B", r.one_f_one_b, 1.40);
        add(r.fast, "ZB1P", r.fast.best_named("zb-h1"), 1.34);
        add(r.fast, "the best interleaved", r.fast.best_named("interleaved"), 1.09);
    } else if (r.at.m == r.at.p) {
        add(r.fast, "1F1B", r.one_f_one_b, 1.78);
        add(r.fast, "interleaved v=4", r.fast.best_named("interleaved-v4"), 1.18);
    } else {
        add(r.fast, "1F1B", r.one_f_one_b, 1.10);
    }
}

// Of the whole grid, m = 2p.
void add_grid_goals(std::vector<Goal>& goals, const std::vector<Result>& grid) {
    double many = INFINITY, two = INFINITY, gap_large = 0, gap_few = 0;
    for (const Result& r : grid) {
        double& least = r.at.p >= 4 ? many : two;
        least = std::min(least, r.fast.best().ms / r.fast.ours.ms);
        if (r.at.p <= 4) gap_few = std::max(gap_few, r.gap());
        else if (r.at.model == "7B" && r.at.context >= 98304) gap_large = std::max(gap_large, r.gap());
    }
    goals.push_back({"all cells of p >= 4: helix against the best without slicing, the worst cell", many, 1});
    goals.push_back({"all cells of p = 2: the same", two, 0.97});
    goals.push_back({"plan over its lower bound, 7B, p = 8, 96k and 128k", gap_large, 1.02, true});
    goals.push_back({"plan over its lower bound, all cells of p <= 4", gap_few, 1.02, true});
}

// ---------------------------------------------------------------------------------------------------------------------
// Output

std::string seconds_text(double ms) { return format("%.2f", 1e-3 * ms); }
std::string ratio_text(double ratio) { return format("%.3f", ratio); }
// Reference over ours, and the same without the head.
std::string ratios_text(const Outcome& reference, const Outcome& ours) {
    if (!(reference.ms < INFINITY) || !(ours.ms < INFINITY)) return "-";
    return ratio_text(reference.ms / ours.ms) + format(" (%.3f)", reference.without_head / ours.without_head);
}
std::string outcome_text(const Outcome& o) {
    return o.ms < INFINITY ? seconds_text(o.ms) + " s " + format("%.1f", o.gb) + " GB" : "-";
}

void print_rows(const std::string& title, const std::vector<std::vector<std::string>>& rows) {
    std::printf("\n%s\n%s", title.c_str(), columns_text(rows).c_str());
}

void print_published(const std::vector<Result>& results) {
    std::vector<std::vector<std::string>> rows = {{"case", "1F1B", "its MLP rebuilt", "ZB1P", "mode", "F=1", "F=2",
                                                   "1F1B / F=2", "ZB1P / F=2", "better / F=1", "bound"}};
    for (const Result& r : results)
        rows.push_back({r.at.name(), outcome_text(r.one_f_one_b), format("%.1f GB", r.mlp_rebuilt.gb),
                        outcome_text(r.zb1p), r.zb1p.mode, outcome_text(r.published[0]), outcome_text(r.published[1]),
                        ratios_text(r.one_f_one_b, r.published[1]), ratios_text(r.zb1p, r.published[1]),
                        ratios_text(r.rival_of_published(), r.published[0]),
                        ratio_text(r.one_f_one_b.ms / r.bound) +
                            format(" (%.3f)", r.one_f_one_b.without_head / r.bound_without_head)});
    print_rows(
        "As published: recompute without attention; in brackets without the head. Bound: 1F1B over the work without "
        "recomputation, spread evenly.",
        rows);
}

void print_alone(const std::vector<Result>& results) {
    std::vector<std::vector<std::string>> rows = {{"case", "schedules by themselves"}};
    for (const Result& r : results) {
        rows.push_back({r.at.name()});
        for (const Outcome& rival : r.alone) rows.back().push_back(rival.name + " " + outcome_text(rival));
    }
    print_rows("Rivals by themselves, recompute none, at any memory", rows);
}

void print_point(const std::vector<Result>& results, Point Result::*which, const std::string& title) {
    std::vector<std::vector<std::string>> rows = {{"case", "ours", "", "", "1F1B / ours", "ZB1P / ours",
                                                   "interleaved / ours", "", "best / ours", "", "seq1f1b / ours",
                                                   "seq1f1b", "bound / ours"}};
    for (const Result& r : results) {
        const Point& point = r.*which;
        const Outcome interleaved = point.best_named("interleaved"), best = point.best();
        rows.push_back({r.at.name(), outcome_text(point.ours), point.ours.name, point.ours.mode,
                        ratios_text(r.one_f_one_b, point.ours), ratios_text(point.best_named("zb-h1"), point.ours),
                        ratios_text(interleaved, point.ours), interleaved.ms < INFINITY ? interleaved.name : "-",
                        ratios_text(best, point.ours), best.name, ratios_text(point.seq1f1b, point.ours),
                        outcome_text(point.seq1f1b), format("%.1f %%", 100 * r.bound / point.ours.ms)});
    }
    print_rows(title, rows);
}

void print_lower_bounds(const std::vector<Result>& results) {
    std::vector<std::vector<std::string>> rows = {
        {"case", "plan", "busiest rank", "one chunk", "plan / bound", "bound and one ramp / bound"}};
    for (const Result& r : results)
        rows.push_back({r.at.name(), seconds_text(r.fast.ours.ms), seconds_text(r.fast.ours.busiest),
                        seconds_text(r.chain), ratio_text(r.gap()),
                        ratio_text(1 + r.ramp / std::max(r.fast.ours.busiest, r.chain))});
    print_rows(
        "Ours at `fast` against its lower bound, seconds: the larger of the busiest rank and the ops of one chunk. One "
        "ramp of helix, (p - 1) posts forward and backward, is there without any messages; rounds have one each",
        rows);
    std::printf("\nCells that helix loses to a rival without slicing, at 1F1B's memory (`auto` takes the winner):\n");
    int lost = 0;
    for (const Result& r : results)
        if (const Outcome& best = r.fast.best(); faster(best, r.fast.ours))
            ++lost, std::printf("  %s: %s is %.3f times as fast\n", r.at.name().c_str(), best.name.c_str(),
                                r.fast.ours.ms / best.ms);
    std::printf("  %d of %zu\n", lost, results.size());
}

void print_changes(const std::vector<Change>& changes) {
    std::vector<std::vector<std::string>> rows = {{"rate", "1F1B / F=2", "ZB1P / F=2"}};
    for (const Change& c : changes)
        rows.push_back({c.what, ratios_text(c.one_f_one_b, c.published), ratios_text(c.zb1p, c.published)});
    print_rows("The published comparison, 7B s=128k p=8 m=16, under other rates; in brackets without the head", rows);
}

void print_ablation(const std::vector<Ablation>& all, const Outcome& reference) {
    std::vector<std::vector<std::string>> rows = {{"improvement", "alone", "1F1B / it", "with all above", "1F1B / it"}};
    for (const Ablation& a : all)
        rows.push_back({a.improvement, outcome_text(a.alone), ratios_text(reference, a.alone), outcome_text(a.together),
                        ratios_text(reference, a.together)});
    print_rows(
        "Improvements over the published schedule, 7B s=128k p=8 m=16. The last four stand in place of two folds",
        rows);
}

void print_curve(const std::vector<CurvePoint>& curve, const Outcome& reference) {
    std::vector<std::vector<std::string>> rows = {{"memory", "ours", "", "", "1F1B / ours", "best without slicing", "",
                                                   "", "best / ours", "seq1f1b", "", "1F1B / seq1f1b"}};
    for (const CurvePoint& c : curve)
        rows.push_back({format("%.0f %%", double(c.percent)), outcome_text(c.ours), c.ours.name, c.ours.mode,
                        ratios_text(reference, c.ours), outcome_text(c.rival), c.rival.name, c.rival.mode,
                        ratios_text(c.rival, c.ours), outcome_text(c.seq1f1b), c.seq1f1b.mode,
                        ratios_text(reference, c.seq1f1b)});
    print_rows("Speed against memory (of that of 1F1B's first stage), 7B s=128k p=8 m=16", rows);
}

void print_goals(const std::vector<Goal>& goals) {
    std::vector<std::vector<std::string>> rows = {{"goal", "value", "goal", "met"}};
    for (const Goal& g : goals)
        rows.push_back(
            {g.what, ratio_text(g.value), (g.at_most ? "<= " : ">= ") + ratio_text(g.goal), g.met() ? "yes" : "NO"});
    print_rows("Goals", rows);
}

// The median of three steps, rehearsed by threads of this machine in some seconds each, more for more chunks so that
// sleeps are as long, in ms of the plan.
double rehearsed_ms(const Cluster& cluster, const Outcome& o, int m) {
    const double seconds = 6 * std::max(1.0, m / 16.0);
    const PlannedStep step = planned(cluster, o.options, m, o.limit);
    const OpCosts costs = step.costs(cluster);
    const double scale = 1e3 * seconds / o.ms;
    Team team{Launch{}};
    const auto steps = rehearse_on(
        team, step, [&](const Op& op) { return scale * costs(op); },
        [&](const Op& send, int rank) { return scale * costs.message_ms(send, rank); }, 1e3 * seconds, 60, 3);
    std::vector<double> ms;
    for (const auto& events : steps) ms.push_back(step_times(events).step / scale);
    std::sort(ms.begin(), ms.end());
    return ms[1];
}

void print_rehearsal(const Cluster& cluster, const std::string& links, const std::vector<Result>& results) {
    std::vector<std::vector<std::string>> rows = {{"case", "schedule", "mode", "simulated s", "measured s",
                                                   "measured / simulated", "its time over ours, measured"}};
    for (const Result& r : results) {
        const double ours = rehearsed_ms(cluster, r.fast.ours, r.at.m);
        const auto add = [&](const std::string& point, const Outcome& o) {
            const double ms = &o == &r.fast.ours ? ours : rehearsed_ms(cluster, o, r.at.m);
            rows.push_back({r.at.name(), point + o.name, o.mode, seconds_text(o.ms), seconds_text(ms),
                            ratio_text(ms / o.ms), ratio_text(ms / ours)});
        };
        add("fast: ", r.fast.ours);
        add("", r.one_f_one_b);
        if (r.at.m > 2 * r.at.p) continue;  // that takes minutes, and has no other goals
        add("lean: ", r.lean.ours);
        add("", r.published[1]);
        add("", r.zb1p);
        add("fast: ", r.fast.best());
        add("lean: ", r.lean.best());
        add("fast: ", r.fast.seq1f1b);
    }
    print_rows("Rehearsed on this machine, links of " + links +
                   ": real loop, transport and order of messages, timed sleeps; medians of three steps",
               rows);
}

void print_json_row(const std::string& name, const std::string& metric, double ours, double reference,
                    const std::string& reference_name, double bound) {
    std::printf("%s\n", json_text({{"case", name},
                                   {"metric", metric},
                                   {"ours", ours},
                                   {"reference", reference},
                                   {"reference_name", reference_name},
                                   {"ratio", reference / ours},
                                   {"bound", bound},
                                   {"percent_of_bound", 100 * bound / ours}},
                                  -1)
                            .c_str());
}

// Times, with the head and without, against every rival that fits, and memory against that of 1F1B's first stage.
void print_json(const Result& r) {
    const auto rows = [&](const std::string& point, const Outcome& ours, const std::vector<Outcome>& references,
                          double limit) {
        const std::string name = r.at.name() + " " + point;
        if (!(ours.ms < INFINITY)) return;
        for (const Outcome& reference : references) {
            if (!(reference.ms < INFINITY)) continue;
            print_json_row(name, "step_ms", ours.ms, reference.ms, reference.name, r.bound);
            print_json_row(name, "step_ms without the head", ours.without_head, reference.without_head, reference.name,
                           r.bound_without_head);
        }
        print_json_row("memory " + name, "GB", ours.gb, r.one_f_one_b.gb, "1f1b", limit);
    };
    rows("published", r.published[1], {r.one_f_one_b, r.zb1p}, r.one_f_one_b.gb);
    rows("published F=1", r.published[0], {r.one_f_one_b, r.zb1p}, r.one_f_one_b.gb);
    for (const Point* point : {&r.fast, &r.lean}) {
        std::vector<Outcome> references = {r.one_f_one_b, point->seq1f1b};
        for (const Outcome& rival : point->rivals)
            if (rival.name != "1f1b") references.push_back(rival);
        rows(point->name, point->ours, references, point->limit);
    }
}

// ---------------------------------------------------------------------------------------------------------------------

int main(int argc, char** argv) {
    bool json = false, rehearse = false;
    for (int i = 1; i < argc; ++i) {
        if (!std::strcmp(argv[i], "--json")) json = true;
        else if (!std::strcmp(argv[i], "--rehearse")) rehearse = true;
        else return std::fprintf(stderr, "helixpipe_paper [--json] [--rehearse]\n"), EXIT_CONFIG;
    }
    const double start = seconds_now();
    const Cluster cluster = read_cluster("h20x64");
    Cluster slow = cluster;
    slow.between.bandwidth = 25;
    std::vector<std::pair<Case, Cluster>> cases;
    for (int m : {64, 8})
        for (const Cluster& c : {cluster, slow}) cases.push_back({{.m = m}, c});
    cases.push_back({{}, slow});
    const size_t grid_begin = cases.size();
    for (const char* model : {"1.3B", "3B", "7B"})
        for (int64_t context : {32768, 65536, 98304, 131072})
            for (int p : {2, 4, 8}) cases.push_back({{model, context, p, 2 * p}, cluster});
    std::vector<std::optional<Result>> found(cases.size());
    std::optional<Contest> largest;  // 7B, 128k, 8 ranks, 16 chunks: the last one of the grid
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i = 0; i < cases.size(); ++i) {
        Contest contest(cases[i].first, cases[i].second);
        found[i].emplace(contest);
        if (i + 1 == cases.size()) largest.emplace(std::move(contest));
    }
    std::vector<Result> grid, others;
    for (size_t i = 0; i < found.size(); ++i) (i < grid_begin ? others : grid).push_back(*std::move(found[i]));
    const Result &main_case = grid.back(), &many = others[0], &few = others[2];

    std::vector<Goal> goals = {
        {"published, 7B s=128k p=8 m=16: the better of 1F1B and ZB1P / F=2, at least 1.26 - 0.04",
         main_case.rival_of_published().ms / main_case.published[1].ms, 1.22},
        {"the same, at most 1.26 + 0.04", main_case.rival_of_published().ms / main_case.published[1].ms, 1.30, true}};
    add_point_goals(goals, main_case, "50 GB/s");
    add_point_goals(goals, others[4], "25 GB/s");
    add_point_goals(goals, few, "50 GB/s");
    add_point_goals(goals, others[3], "25 GB/s");
    add_point_goals(goals, many, "50 GB/s");
    add_point_goals(goals, others[1], "25 GB/s");
    add_grid_goals(goals, grid);

    std::vector<Result> shown = grid;
    shown.push_back(few), shown.push_back(many);
    if (json) {
        for (const Result& r : shown) print_json(r);
        return 0;
    }
    std::printf(
        "HelixPipe's evaluation, simulated on %s\n"
        "bf16, chunks of one sequence, MLP in chunks of 4096 rows, head in chunks of 1024; efficiency 1 at all sizes. "
        "Ours of one fold: %d row pieces\n",
        cluster_text(cluster, cluster.ranks()).c_str(), row_pieces);
    print_published(shown);
    print_alone(shown);
    print_point(shown, &Result::fast, "fast: at the memory of 1F1B's first stage; in brackets without the head");
    print_point(shown, &Result::lean, "lean: at 30 % of it");
    print_point({others[4], others[3], others[1]}, &Result::fast, "fast, links of 25 GB/s");
    print_point({others[4], others[3], others[1]}, &Result::lean, "lean, links of 25 GB/s");
    print_changes(changes_of_rates(*largest));
    print_ablation(ablation(*largest), largest->one_f_one_b());
    print_curve(curve_of(*largest), largest->one_f_one_b());
    print_lower_bounds(shown);
    goals.push_back({"seconds that all of this took", seconds_now() - start, 60, true});
    print_goals(goals);
    if (rehearse) {
        print_rehearsal(cluster, "50 GB/s", {main_case, few, many});
        print_rehearsal(slow, "25 GB/s", {others[4], others[3], others[1]});
    }
    return 0;
}
