/* A libnvidia-ml.so.1 that plays a script: FAKE_NVML names it, and nvmlInit reads it.

   The time is the double in the file FAKE_NVML_CLOCK, else CLOCK_MONOTONIC; the script's times count from its `epoch`.
   One word and its values a line; `device` begins a GPU, what follows is its own:

     driver 550.54.15        cuda 12040        epoch 100
     device GPU-a            name NVIDIA_A100  (underscores are blanks)
     power T W T W …         piecewise linear, and constant before and after
     average S               the power reading is the mean over that long; default 0
     tick S OFFSET           the energy counter moves at OFFSET + n·S; default: always
     began MJ                the counter's millijoules at time 0
     reload T                the counter starts at zero again
     temperature T V T V …   steps, as: clock, utilization, used (MiB), throttle (bits), process (pid, 0: none)
     total MIB               limit W           persistence 0|1
     fail CALL CODE T UNTIL  from T on, for good without UNTIL; CALL without its prefix (`GetPowerUsage`), or * for all
     hang CALL T             it does not return any more
     mig UUID MIB            an instance; the first turns the MIG mode on; `migmode` alone: on, without any
*/
#define _GNU_SOURCE
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MOST 256
#define API __attribute__((visibility("default")))
enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, TOO_SMALL = 7, NOT_LOADED = 9, NOT_FOUND = 6, UNINITIALIZED = 1 };

typedef struct { int n; double t[MOST], v[MOST]; } Course;
typedef struct { char call[64]; int code; double since, until; } Fault;
typedef struct Device {
    struct Device *parent; /* of a MIG instance */
    char uuid[96], name[96];
    Course power, temperature, clock, utilization, used, throttle, process;
    double average, tick, offset, began, reload, total, limit;
    int persistence, mig_mode, migs, faults;
    Fault fault[16];
    struct Device *mig[8];
} Device;

static Device devices[16];
static int count, loaded, no_driver;
static char driver[80];
static int cuda;
static double epoch;
static volatile double *fake_clock;

static double now(void) {
    if (fake_clock) return *fake_clock - epoch;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9 - epoch;
}

static double linear(const Course *c, double t) {
    if (c->n == 0) return 0;
    if (t <= c->t[0]) return c->v[0];
    for (int i = 1; i < c->n; i++)
        if (t <= c->t[i]) return c->v[i - 1] + (c->v[i] - c->v[i - 1]) * (t - c->t[i - 1]) / (c->t[i] - c->t[i - 1]);
    return c->v[c->n - 1];
}

static double step(const Course *c, double t) {
    double found = c->n ? c->v[0] : 0;
    for (int i = 0; i < c->n && c->t[i] <= t; i++) found = c->v[i];
    return found;
}

/* From 0 to t, exactly: a trapezoid between any two bends. */
static double joules(const Course *c, double t) {
    double sum = 0, at = 0;
    for (int i = 0; i <= c->n; i++) {
        double until = i < c->n && c->t[i] < t ? c->t[i] : t;
        if (until > at) sum += (linear(c, at) + linear(c, until)) / 2 * (until - at), at = until;
    }
    return sum;
}

static void parse(FILE *script) {
    static char line[65536];
    Device *d = NULL;
    memset(devices, 0, sizeof devices);
    count = 0, epoch = 0, cuda = 12040, no_driver = 0;
    strcpy(driver, "550.54.15");
    while (fgets(line, sizeof line, script)) {
        char *rest, *word = strtok_r(line, " \n", &rest), *value = strtok_r(NULL, " \n", &rest);
        if (!word) continue;
        double x = value ? atof(value) : 0;
        Course *course = NULL;
        if (!strcmp(word, "driver")) snprintf(driver, sizeof driver, "%s", value);
        else if (!strcmp(word, "cuda")) cuda = (int)x;
        else if (!strcmp(word, "epoch")) epoch = x;
        else if (!strcmp(word, "no_driver")) no_driver = 1;
        else if (!strcmp(word, "device")) {
            d = &devices[count++];
            snprintf(d->uuid, sizeof d->uuid, "%s", value);
            strcpy(d->name, "Fake GPU");
            d->reload = -1, d->total = 16384, d->limit = 400, d->persistence = 1;
        } else if (!strcmp(word, "name")) {
            snprintf(d->name, sizeof d->name, "%s", value);
            for (char *c = d->name; *c; c++) if (*c == '_') *c = ' ';
        } else if (!strcmp(word, "average")) d->average = x;
        else if (!strcmp(word, "tick")) d->tick = x, d->offset = atof(strtok_r(NULL, " \n", &rest));
        else if (!strcmp(word, "began")) d->began = x;
        else if (!strcmp(word, "reload")) d->reload = x;
        else if (!strcmp(word, "total")) d->total = x;
        else if (!strcmp(word, "limit")) d->limit = x;
        else if (!strcmp(word, "persistence")) d->persistence = (int)x;
        else if (!strcmp(word, "migmode")) d->mig_mode = 1;
        else if (!strcmp(word, "mig")) {
            Device *m = d->mig[d->migs++] = calloc(1, sizeof *m);
            m->parent = d, d->mig_mode = 1;
            snprintf(m->uuid, sizeof m->uuid, "%s", value);
            snprintf(m->name, sizeof m->name, "%.80s MIG", d->name);
            m->total = atof(strtok_r(NULL, " \n", &rest));
        } else if (!strcmp(word, "fail") || !strcmp(word, "hang")) {
            Fault *f = &d->fault[d->faults++];
            snprintf(f->call, sizeof f->call, "%s", value);
            f->code = word[0] == 'f' ? atoi(strtok_r(NULL, " \n", &rest)) : -1;
            f->since = atof(strtok_r(NULL, " \n", &rest));
            char *until = strtok_r(NULL, " \n", &rest);
            f->until = until ? atof(until) : INFINITY;
        } else if (!strcmp(word, "power")) course = &d->power;
        else if (!strcmp(word, "temperature")) course = &d->temperature;
        else if (!strcmp(word, "clock")) course = &d->clock;
        else if (!strcmp(word, "utilization")) course = &d->utilization;
        else if (!strcmp(word, "used")) course = &d->used;
        else if (!strcmp(word, "throttle")) course = &d->throttle;
        else if (!strcmp(word, "process")) course = &d->process;
        else fprintf(stderr, "fake nvml: %s?\n", word), abort();
        for (; course && value; value = strtok_r(NULL, " \n", &rest)) {
            course->t[course->n] = atof(value);
            course->v[course->n++] = atof(strtok_r(NULL, " \n", &rest));
        }
    }
}

static int fails(Device *d, const char *call) {
    if (!loaded) return UNINITIALIZED;
    if (!d) return INVALID;
    Device *own = d->parent ? d->parent : d;
    for (int i = 0; i < own->faults; i++) {
        Fault *f = &own->fault[i];
        if ((f->call[0] == '*' || !strcmp(f->call, call)) && now() >= f->since && now() < f->until) {
            while (f->code < 0) pause();
            return f->code;
        }
    }
    return OK;
}
#define CALL(device, call) do { int code_ = fails(device, call); if (code_) return code_; } while (0)
/* An instance shows its memory and its name alone. */
#define WHOLE(device, call) do { CALL(device, call); if ((device)->parent) return NOT_SUPPORTED; } while (0)

API int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    const char *script = getenv("FAKE_NVML"), *clock = getenv("FAKE_NVML_CLOCK");
    FILE *file = script ? fopen(script, "r") : NULL;
    if (!file) return NOT_LOADED;
    parse(file);
    fclose(file);
    if (no_driver) return NOT_LOADED;
    fake_clock = NULL;
    if (clock && *clock) {
        int fd = open(clock, O_RDONLY);
        fake_clock = mmap(NULL, sizeof(double), PROT_READ, MAP_SHARED, fd, 0);
        close(fd);
    }
    return loaded = 1, OK;
}
API int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
API int nvmlShutdown(void) { return loaded = 0, OK; }
API const char *nvmlErrorString(int code) { return code == 15 ? "GPU is lost" : code == 3 ? "Not Supported" : "an error"; }
API int nvmlSystemGetDriverVersion(char *to, unsigned size) { return snprintf(to, size, "%s", driver), OK; }
API int nvmlSystemGetCudaDriverVersion_v2(int *to) { return *to = cuda, OK; }
API int nvmlDeviceGetCount_v2(unsigned *to) { return *to = count, OK; }
API int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **to) {
    if ((int)index >= count) return INVALID;
    CALL(&devices[index], "GetHandleByIndex");
    return *to = &devices[index], OK;
}
API int nvmlDeviceGetUUID(Device *d, char *to, unsigned size) {
    CALL(d, "GetUUID");
    return snprintf(to, size, "%s", d->uuid), OK;
}
API int nvmlDeviceGetName(Device *d, char *to, unsigned size) {
    CALL(d, "GetName");
    return snprintf(to, size, "%s", d->name), OK;
}
API int nvmlDeviceGetTotalEnergyConsumption(Device *d, unsigned long long *to) {
    WHOLE(d, "GetTotalEnergyConsumption");
    double t = now();
    if (d->tick > 0) t = floor((t - d->offset) / d->tick + 1e-9) * d->tick + d->offset;
    double since = d->reload >= 0 && now() >= d->reload ? joules(&d->power, d->reload) - 0.0 : -d->began / 1000;
    double mj = (joules(&d->power, t) - since) * 1000;
    return *to = mj > 0 ? (unsigned long long)mj : 0, OK;
}
API int nvmlDeviceGetPowerUsage(Device *d, unsigned *to) {
    WHOLE(d, "GetPowerUsage");
    double t = now(), w = d->average > 0
        ? (joules(&d->power, t) - joules(&d->power, t - d->average)) / d->average : linear(&d->power, t);
    return *to = (unsigned)(w * 1000 + 0.5), OK;
}
typedef struct { unsigned field, scope; int64_t at, latency; int type, code; union { unsigned ui; double d; } value; } Field;
API int nvmlDeviceGetFieldValues(Device *d, int n, Field *fields) {
    WHOLE(d, "GetFieldValues");
    for (int i = 0; i < n; i++) {
        fields[i].code = fields[i].field == 186 ? fails(d, "PowerInstant") : NOT_SUPPORTED;
        fields[i].type = 1;
        fields[i].value.ui = (unsigned)(linear(&d->power, now()) * 1000 + 0.5);
    }
    return OK;
}
typedef struct { unsigned version; int sensor, celsius; } Temperature;
API int nvmlDeviceGetTemperatureV(Device *d, Temperature *to) {
    WHOLE(d, "GetTemperatureV");
    return to->celsius = (int)step(&d->temperature, now()), OK;
}
API int nvmlDeviceGetTemperature(Device *d, int sensor, unsigned *to) {
    (void)sensor;
    WHOLE(d, "GetTemperature");
    return *to = (unsigned)step(&d->temperature, now()), OK;
}
API int nvmlDeviceGetClockInfo(Device *d, int which, unsigned *to) {
    (void)which;
    WHOLE(d, "GetClockInfo");
    return *to = (unsigned)step(&d->clock, now()), OK;
}
API int nvmlDeviceGetUtilizationRates(Device *d, unsigned *to) {
    WHOLE(d, "GetUtilizationRates");
    return to[0] = (unsigned)step(&d->utilization, now()), to[1] = 0, OK;
}
API int nvmlDeviceGetMemoryInfo(Device *d, unsigned long long *to) {
    CALL(d, "GetMemoryInfo");
    double used = step(&(d->parent ? d->parent : d)->used, now());
    return to[0] = d->total * 1048576, to[1] = (d->total - used) * 1048576, to[2] = used * 1048576, OK;
}
API int nvmlDeviceGetCurrentClocksThrottleReasons(Device *d, unsigned long long *to) {
    WHOLE(d, "GetCurrentClocksThrottleReasons");
    return *to = (unsigned long long)step(&d->throttle, now()), OK;
}
API int nvmlDeviceGetPersistenceMode(Device *d, unsigned *to) {
    WHOLE(d, "GetPersistenceMode");
    return *to = d->persistence, OK;
}
API int nvmlDeviceGetEnforcedPowerLimit(Device *d, unsigned *to) {
    WHOLE(d, "GetEnforcedPowerLimit");
    return *to = (unsigned)(d->limit * 1000), OK;
}
typedef struct { unsigned pid; unsigned long long memory; unsigned gi, ci; } Process;
API int nvmlDeviceGetComputeRunningProcesses_v3(Device *d, unsigned *n, Process *to) {
    CALL(d, "GetComputeRunningProcesses");
    double pid = step(&(d->parent ? d->parent : d)->process, now());
    if (pid == 0) return *n = 0, OK;
    if (*n < 1 || !to) return *n = 1, TOO_SMALL;
    to[0] = (Process){(unsigned)pid, 1 << 30, ~0u, ~0u};
    return *n = 1, OK;
}
API int nvmlDeviceGetMigMode(Device *d, unsigned *current, unsigned *pending) {
    WHOLE(d, "GetMigMode");
    return *current = *pending = d->mig_mode, OK;
}
API int nvmlDeviceGetMaxMigDeviceCount(Device *d, unsigned *to) { return *to = d->mig_mode ? 7 : 0, OK; }
API int nvmlDeviceGetMigDeviceHandleByIndex(Device *d, unsigned index, Device **to) {
    if ((int)index >= d->migs) return NOT_FOUND;
    return *to = d->mig[index], OK;
}
