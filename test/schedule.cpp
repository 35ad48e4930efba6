// Tests of core/schedule.h: 1F1B. Every stage's passes are checked against what a pipeline may do, in an execution that knows nothing of how the schedule
// is made: each micro-batch once forward and once backward, none before what it waits for, none waiting for ever, no more in flight than there is room for.
#include "check.h"
#include "../core/schedule.h"
#include <algorithm>

struct Shape { int stages, micro_batches; };
static const Shape shapes[] = {{1, 1}, {1, 7}, {2, 1}, {2, 2}, {2, 9}, {3, 2}, {4, 1}, {4, 3}, {4, 4}, {4, 5}, {4, 128}, {5, 3}, {7, 20}, {8, 8}, {16, 5}, {16, 100}, {64, 3},
    {64, 200}};

// Fails where a pass is missing, doubled or out of its micro-batches' order
static void every_micro_batch_goes_once_forward_and_once_backward(void**) {
    for (const Shape& x : shapes) {
        for (int s = 0; s < x.stages; s++) {
            assert_int_equal(schedule_steps(x.micro_batches), 2 * x.micro_batches);
            int forward = 0, backward = 0;
            for (int64_t i = 0; i < schedule_steps(x.micro_batches); i++) {
                ScheduleStep step = schedule_step(x.stages, s, x.micro_batches, i);
                int* next = step.forward ? &forward : &backward;
                assert_int_equal(step.micro_batch, *next);
                (*next)++;
                assert_true(backward <= forward);
            }
            assert_int_equal(forward, x.micro_batches);
            assert_int_equal(backward, x.micro_batches);
        }
    }
}

// Fails on a schedule that keeps more than stages - stage, or whose stated maximum is not reached
static void what_is_in_flight_is_what_is_said(void**) {
    for (const Shape& x : shapes) {
        for (int s = 0; s < x.stages; s++) {
            int now = 0, most = 0;
            for (int64_t i = 0; i < schedule_steps(x.micro_batches); i++) {
                now += schedule_step(x.stages, s, x.micro_batches, i).forward ? 1 : -1;
                most = std::max(most, now);
            }
            assert_int_equal(now, 0);
            assert_true(most <= x.stages - s);
            assert_int_equal(most, schedule_in_flight(x.stages, s, x.micro_batches));
            assert_int_equal(most, std::min(x.stages - s, x.micro_batches));
        }
    }
}

// Runs it: in each round the stages whose next pass waits for nothing make it. Returns when each pass ended; fails on a deadlock. An own reckoning with
// all times kept, whereas schedule_makespan keeps a window.
static double execute(Shape x, const std::vector<double>& f, const std::vector<double>& b) {
    size_t S = (size_t)x.stages, K = (size_t)x.micro_batches;
    std::vector<std::vector<double>> forward(S, std::vector<double>(K, -1.0)), backward = forward;
    std::vector<double> clock(S, 0.0);
    std::vector<int64_t> next(S, 0);
    for (size_t left = 2 * S * K; left > 0;) {
        size_t before = left;
        for (size_t s = 0; s < S; s++) {
            if (next[s] == schedule_steps(x.micro_batches)) { continue; }
            ScheduleStep step = schedule_step(x.stages, (int)s, x.micro_batches, next[s]);
            size_t k = (size_t)step.micro_batch;
            double ready = step.forward ? (s == 0 ? 0.0 : forward[s - 1][k]) : s == S - 1 ? forward[s][k] : backward[s + 1][k];
            if (ready < 0.0) { continue; }
            clock[s] = std::max(clock[s], ready) + (step.forward ? f[s] : b[s]);
            (step.forward ? forward : backward)[s][k] = clock[s];
            next[s]++;
            left--;
        }
        if (left == before) { fail_msg("%d stages, %d micro-batches: all wait", x.stages, x.micro_batches); }
    }
    return *std::max_element(clock.begin(), clock.end());
}

static void a_step_of_equal_stages_takes_k_plus_stages_less_one(void**) {
    for (const Shape& x : shapes) {
        std::vector<double> f((size_t)x.stages, 1.0), b((size_t)x.stages, 2.25);
        double want = (x.micro_batches + x.stages - 1) * 3.25;
        expect_near(execute(x, f, b), want, 1e-9 * want, "%d stages, %d micro-batches, executed", x.stages, x.micro_batches);
        expect_near(schedule_makespan(x.stages, x.micro_batches, f.data(), b.data()), want, 1e-9 * want, "%d stages, %d micro-batches", x.stages, x.micro_batches);
    }
}

// Fails where the window forgets a time that is still waited for
static void unequal_stages_take_what_an_execution_takes(void**) {
    for (const Shape& x : shapes) {
        for (int trial = 0; trial < 5; trial++) {
            std::vector<double> f, b;
            for (int s = 0; s < x.stages; s++) { f.push_back(uniform(0.1, 3.0)); b.push_back(uniform(0.1, 3.0)); }
            double want = execute(x, f, b);
            expect_near(schedule_makespan(x.stages, x.micro_batches, f.data(), b.data()), want, 1e-9 * want, "%d stages, %d micro-batches, trial %d", x.stages,
                        x.micro_batches, trial);
        }
    }
}

// Beyond SCHEDULE_SIMULATED the rest is reckoned, not gone through: the same up to rounding, in no time
static void many_micro_batches_take_no_longer_to_reckon(void**) {
    for (int stages : {1, 2, 4, 16}) {
        std::vector<double> f, b;
        for (int s = 0; s < stages; s++) { f.push_back(uniform(0.5, 1.5)); b.push_back(uniform(0.5, 1.5)); }
        Shape x = {stages, SCHEDULE_SIMULATED + 1000};
        double want = execute(x, f, b);
        expect_near(schedule_makespan(stages, x.micro_batches, f.data(), b.data()), want, 1e-9 * want, "%d stages", stages);
    }
    double f = 1.0, b = 2.0, start = wall_seconds();
    expect_near(schedule_makespan(1, INT32_MAX, &f, &b), 3.0 * INT32_MAX, 1.0, "one stage");
    assert_true(wall_seconds() - start < 1.0);
    ScheduleStep last = schedule_step(4, 0, INT32_MAX, schedule_steps(INT32_MAX) - 1);
    assert_true(!last.forward);
    assert_int_equal(last.micro_batch, INT32_MAX - 1);
}

// ---- exchanges ----

// A message as a stage names it: micro-batch k's output or gradient
static int message(bool forward, int k) { return 2 * k + (forward ? 1 : 0); }

// A stage as a machine that makes exchanges and passes. `sends` and `receives`: the halves of its exchange that are not done.
struct Stage {
    int64_t exchange = 0;
    bool sends = false, receives = false;
    int forward = 0, backward = 0;        // passes that are done
};

// Exchanges between stages that end only when both sides have come. `paired`: a stage sends and receives at once, else it sends first. Returns
// whether all came to their end; fails on a message that is not the one that is waited for, and on a slot that is taken while in use.
static bool all_exchanges_end(Shape x, bool paired) {
    int K = x.micro_batches;
    std::vector<Stage> stages((size_t)x.stages);
    auto now = [&](int s) { return schedule_exchange(x.stages, s, K, stages[(size_t)s].exchange); };
    auto enter = [&](int s) {
        Stage* a = &stages[(size_t)s];
        ScheduleExchange e = now(s);
        a->sends = e.to >= 0;
        a->receives = e.from >= 0;
        assert_true(e.to < x.stages && e.from < x.stages && e.to != s && e.from != s);
        if (a->exchange == schedule_steps(K)) { return; }
        ScheduleStep next = schedule_step(x.stages, s, K, a->exchange);
        int flight = schedule_in_flight(x.stages, s, K);
        if (next.forward && next.micro_batch >= flight) { assert_true(a->backward > next.micro_batch - flight); }  // who had its slot has been backward
        assert_int_equal(e.from, next.forward ? s - 1 : s + 1 < x.stages ? s + 1 : -1);
    };
    for (int s = 0; s < x.stages; s++) { enter(s); }
    for (bool moved = true; moved;) {
        moved = false;
        for (int s = 0; s < x.stages; s++) {
            Stage* a = &stages[(size_t)s];
            if (a->exchange > schedule_steps(K)) { continue; }
            ScheduleExchange e = now(s);
            Stage* b = a->sends ? &stages[(size_t)e.to] : NULL;
            if (b != NULL && b->exchange <= schedule_steps(K) && b->receives && now(e.to).from == s && (paired || !b->sends)) {
                ScheduleStep made = schedule_step(x.stages, s, K, a->exchange - 1), needed = schedule_step(x.stages, e.to, K, b->exchange);
                assert_int_equal(message(made.forward, made.micro_batch), message(needed.forward, needed.micro_batch));
                assert_int_equal(e.to, made.forward ? s + 1 : s - 1);
                a->sends = b->receives = false;
                moved = true;
            }
            if (a->sends || a->receives) { continue; }
            moved = true;
            if (a->exchange < schedule_steps(K)) { (schedule_step(x.stages, s, K, a->exchange).forward ? a->forward : a->backward)++; }
            a->exchange++;
            if (a->exchange <= schedule_steps(K)) { enter(s); }
        }
    }
    for (const Stage& a : stages) {
        if (a.exchange <= schedule_steps(K)) { return false; }
        assert_int_equal(a.forward, K);
        assert_int_equal(a.backward, K);
    }
    return true;
}

// Fails on exchanges that wait for each other, on messages in a wrong order, and on a slot k % in_flight that is still in use
static void exchanges_end_and_bring_what_is_needed(void**) {
    for (int stages = 1; stages <= 8; stages++) {
        for (int K = 1; K <= 32; K++) {
            if (!all_exchanges_end({stages, K}, true)) { fail_msg("%d stages, %d micro-batches: stages wait for each other", stages, K); }
        }
    }
    for (const Shape& x : shapes) { assert_true(all_exchanges_end(x, true)); }
}

// What the simulation is to find: who sends before he receives waits for ever, wherever a stage takes passes in turns
static void sending_before_receiving_waits_for_ever(void**) {
    for (int stages = 2; stages <= 8; stages++) {
        assert_true(all_exchanges_end({stages, 1}, false));
        for (int K = 2; K <= 32; K++) { assert_false(all_exchanges_end({stages, K}, false)); }
    }
}

static void what_stages_exchange_is_written_out(void**) {
    // two stages, three micro-batches: F0 F1 B0 F2 B1 B2 and F0 B0 F1 B1 F2 B2
    const ScheduleExchange first[] = {{-1, -1}, {1, -1}, {1, 1}, {-1, -1}, {1, 1}, {-1, 1}, {-1, -1}};
    const ScheduleExchange last[] = {{-1, 0}, {-1, -1}, {0, 0}, {-1, -1}, {0, 0}, {-1, -1}, {0, -1}};
    for (int i = 0; i <= 6; i++) {
        ScheduleExchange a = schedule_exchange(2, 0, 3, i), b = schedule_exchange(2, 1, 3, i);
        assert_int_equal(a.to, first[i].to);
        assert_int_equal(a.from, first[i].from);
        assert_int_equal(b.to, last[i].to);
        assert_int_equal(b.from, last[i].from);
    }
}

static void a_pass_that_is_none_is_refused(void**) {
    expect_end(1, "pass 6 of 6", NULL, [] { schedule_step(2, 0, 3, 6); });
    expect_end(1, "pass -1 of 6", NULL, [] { schedule_step(2, 0, 3, -1); });
    expect_end(1, "pass 6 of 6", NULL, [] { schedule_exchange(2, 0, 3, 7); });
    expect_end(1, "pass -1 of 6", NULL, [] { schedule_exchange(2, 0, 3, -1); });
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_micro_batch_goes_once_forward_and_once_backward),
        cmocka_unit_test(what_is_in_flight_is_what_is_said),
        cmocka_unit_test(a_step_of_equal_stages_takes_k_plus_stages_less_one),
        cmocka_unit_test(unequal_stages_take_what_an_execution_takes),
        cmocka_unit_test(many_micro_batches_take_no_longer_to_reckon),
        cmocka_unit_test(exchanges_end_and_bring_what_is_needed),
        cmocka_unit_test(sending_before_receiving_waits_for_ever),
        cmocka_unit_test(what_stages_exchange_is_written_out),
        cmocka_unit_test(a_pass_that_is_none_is_refused),
    };
    return RUN_TESTS(tests);
}
