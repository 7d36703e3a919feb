/* A library NVML with one card in MIG mode, of which one slice is ours, for pynvml itself to call.

   NVML_FAILS names a call and the error code that it answers with. A call that an older driver does not have is renamed
   away as this is compiled (-DnvmlDeviceGetMigMode=gone). */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int pid; unsigned long long bytes; unsigned int instance, slice; } Process;
typedef int *Device;

enum { INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };

static int card = 0, slice = 1;
static char calls[4096];

/* Which calls there were since the last time. */
const char *calls_made(void)
{
    static char told[4096];
    strcpy(told, calls);
    calls[0] = 0;
    return told;
}

static int answer(const char *call)
{
    const char *fails = getenv("NVML_FAILS");
    size_t length = strlen(call);
    snprintf(calls + strlen(calls), sizeof calls - strlen(calls), "%s ", call);
    return fails && !strncmp(fails, call, length) && fails[length] == ':' ? atoi(fails + length + 1) : 0;
}

/* Return from a call with its error, if it is the one that fails. */
#define CALL do { int code = answer(__func__); if (code) return code; } while (0)

static const char *text(const char *name, const char *otherwise)
{
    const char *given = getenv(name);
    return given ? given : otherwise;
}

static int processes(unsigned int *count, Process *made)
{
    unsigned int there = atoi(text("NVML_PROCESSES", "1"));
    if (!made) {
        *count = there;
        return there ? INSUFFICIENT_SIZE : 0;
    }
    *count = there;
    for (unsigned int i = 0; i < there; i++)
        made[i] = (Process){4000000 + i, 1ull << 30, 0, 0};
    return 0;
}

const char *nvmlErrorString(int code) { return code == 999 ? "Unknown Error" : "an error of the library's own"; }
int nvmlInitWithFlags(unsigned int flags) { CALL; return 0; }
int nvmlShutdown(void) { CALL; return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { CALL; *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device *device)
{
    CALL;
    *device = &card;
    return index ? INVALID_ARGUMENT : 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, Device *device)
{
    CALL;
    *device = &slice;
    return strcmp(uuid, "MIG-1") ? NOT_FOUND : 0;
}
int nvmlDeviceGetUUID(Device device, char *uuid, unsigned int length)
{
    CALL;
    snprintf(uuid, length, "%s", device == &card ? "GPU-1" : "MIG-1");
    return 0;
}
int nvmlDeviceGetName(Device device, char *name, unsigned int length)
{
    CALL;
    snprintf(name, length, "%s", text("NVML_NAME", device == &card ? "NVIDIA A100" : "NVIDIA A100 MIG 1g.10gb"));
    return 0;
}
int nvmlDeviceGetMemoryInfo(Device device, Memory *memory)
{
    CALL;
    *memory = device == &card ? (Memory){80ull << 30, 70ull << 30, 10ull << 30} : (Memory){9ull << 30, 8ull << 30, 1ull << 30};
    return 0;
}
int nvmlDeviceGetMigMode(Device device, unsigned int *now, unsigned int *then) { CALL; *now = *then = 1; return 0; }
int nvmlDeviceGetMaxMigDeviceCount(Device device, unsigned int *count) { CALL; *count = 2; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(Device device, unsigned int index, Device *found)
{
    CALL;
    *found = &slice;
    return index == 1 ? 0 : NOT_FOUND;
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device device, Device *found)
{
    CALL;
    *found = &card;
    return device == &slice ? 0 : INVALID_ARGUMENT;
}
int nvmlDeviceGetCudaComputeCapability(Device device, int *major, int *minor)
{
    CALL;
    *major = 8;
    *minor = 0;
    return device == &card ? 0 : INVALID_ARGUMENT;
}
int nvmlDeviceGetComputeRunningProcesses_v3(Device device, unsigned int *count, Process *made)
{
    CALL;
    return processes(count, made);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(Device device, unsigned int *count, Process *made)
{
    CALL;
    return processes(count, made);
}
