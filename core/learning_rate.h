// learning_rate.h: the course of the learning rate over a run.
#pragma once
#include "common.h"
#include <math.h>

enum RateSchedule { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_CONSTANT, SCHEDULE_WSD };

// Linear warm-up to lr, then the schedule down towards lr·floor, which step number `steps` would have
static inline double learning_rate(RateSchedule schedule, double lr, double floor, int64_t warmup, int64_t step, int64_t steps) {
    if (step < warmup) { return lr * (double)(step + 1) / (double)warmup; }
    double share = steps > warmup ? (double)(step - warmup) / (double)(steps - warmup) : 1.0, left;
    switch (schedule) {
        case SCHEDULE_COSINE: left = 0.5 * (1.0 + cos(M_PI * share)); break;
        case SCHEDULE_LINEAR: left = 1.0 - share; break;
        case SCHEDULE_WSD: {
            double decay = 0.8 * (double)steps;
            left = (double)step < decay ? 1.0 : 1.0 - sqrt(((double)step - decay) / ((double)steps - decay));
            break;
        }
        default: left = 1.0;
    }
    return lr * (floor + (1.0 - floor) * left);
}
