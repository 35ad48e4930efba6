// Tests of core/trouble.h, core/host_memory.h and what core/files.h says of a path that is not there: what a user reads of a failure that this machine cannot show.
#include "check.h"
#include "../core/files.h"

static void says(const std::string& text, std::vector<const char*> words) {
    for (const char* word : words) {
        if (text.find(word) == std::string::npos) { fail_msg("no '%s' in: %s", word, text.c_str()); }
    }
    assert_true(text.find('\n') == std::string::npos && text.size() < 1000);
}

// Fails where a machine without a driver is taken for one with an old one, where a hidden GPU is not told from none, or versions and capabilities are misread
static void gpus(void**) {
    GpuFacts f = {NULL, 0, 13000, 0, "800,900"};
    says(gpu_trouble_text(GPU_ABSENT, &f), {"no NVIDIA driver", "make DEVICE=cpu"});
    f.driver = 12020;
    says(gpu_trouble_text(GPU_ABSENT, &f), {"no GPU is visible", "nvidia-smi -L", "make DEVICE=cpu"});
    f.visible = "";
    says(gpu_trouble_text(GPU_ABSENT, &f), {"CUDA_VISIBLE_DEVICES is ''", "unset it", "make DEVICE=cpu"});
    f.visible = "-1";
    says(gpu_trouble_text(GPU_ABSENT, &f), {"CUDA_VISIBLE_DEVICES is '-1'"});
    says(gpu_trouble_text(GPU_DRIVER_OLD, &f), {"driver is for CUDA 12.2", "built by CUDA 13.0", "newer driver", "CUDA_HOME"});
    f.capability = 89;
    says(gpu_trouble_text(GPU_NO_CODE, &f), {"capability 8.9", "built for 8.0, 9.0: ", "make DEVICE=cuda GPU_ARCH=89"});
    f.capability = 90;
    f.built = "800";
    says(gpu_trouble_text(GPU_NO_CODE, &f), {"capability 9.0", "built for 8.0: ", "GPU_ARCH=90a"});
    f.capability = 120;
    f.built = "1000";
    says(gpu_trouble_text(GPU_NO_CODE, &f), {"capability 12.0", "built for 10.0: ", "GPU_ARCH=120"});
    f.capability = 75;
    says(gpu_trouble_text(GPU_TOO_OLD, &f), {"capability 7.5", "8.0 is the least", "make DEVICE=cpu"});
}

// Fails where a cause gets another's advice, or the library's own words are lost
static void nccl(void**) {
    says(nccl_trouble_text(2, "ncclCommInitRankConfig: unhandled system error", "socket: no route"),
         {"ncclCommInitRankConfig: unhandled system error (socket: no route); hint: ", "NCCL_SOCKET_IFNAME", "firewall", "/dev/shm", "NCCL_DEBUG=INFO"});
    says(nccl_trouble_text(5, "x", ""), {"x; hint: ", "share a GPU", "--staged", "versions of NCCL"});
    says(nccl_trouble_text(6, "x", ""), {"another rank has ended", "its message first", "firewall"});
    says(nccl_trouble_text(1, "x", ""), {"CUDA call", "memory full"});
    says(nccl_trouble_text(3, "x", ""), {"same version of NCCL"});
    says(nccl_trouble_text(0, "nothing for 600 seconds", ""), {"nothing for 600 seconds; hint: was every rank started", "NCCL_SOCKET_IFNAME"});
    assert_string_equal(nccl_trouble_text(4, "x", "").c_str(), "x; NCCL_DEBUG=INFO tells more");
}

static void launchers(void**) {
    LaunchFacts f = {false, false, 8};
    assert_string_equal(launch_text(8, "./train_gpt_fp8", &f).c_str(), "mpirun -np 8 ./train_gpt_fp8 …");
    assert_string_equal(launch_text(9, "./train_gpt_fp8", &f).c_str(), "mpirun -np 9 --oversubscribe ./train_gpt_fp8 …");
    f.root = true;
    assert_string_equal(launch_text(9, "./x", &f).c_str(), "mpirun -np 9 --allow-run-as-root --oversubscribe ./x …");
    f.slurm = true;
    assert_string_equal(launch_text(9, "./x", &f).c_str(), "srun -n 9 ./x …");
}

static void errors(void**) {
    says(error_of(ENOSPC), {"No space left on device (", "df -h"});
    says(error_of(EMFILE), {"Too many open files (", "ulimit -n"});
    says(error_of(EFBIG), {"ulimit -f"});
    assert_string_equal(error_of(ENOENT).c_str(), strerror(ENOENT));
}

static std::string folder;  // of these tests
static void put(const std::string& name, const char* text) {
    std::string path = folder + "/" + name;
    for (size_t at = path.find('/', folder.size() + 1); at != std::string::npos; at = path.find('/', at + 1)) { mkdir(path.substr(0, at).c_str(), 0777); }
    FILE* f = fopen(path.c_str(), "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

// Fails where a group's limit, that of a group around it, or one of the two versions is missed, or the caches of files count as used
static void limits_of_control_groups(void**) {
    auto left = [](const char* self) {
        put("self", self);
        return group_memory_free(folder + "/groups", folder + "/self");
    };
    put("groups/job/memory.max", "1000000\n");
    put("groups/job/memory.current", "400000\n");
    put("groups/job/memory.stat", "anon 100000\nfile 250000\nactive_file 50000\ninactive_file 200000\n");
    put("groups/job/step/memory.max", "max\n");
    put("groups/job/step/memory.current", "300000\n");
    assert_int_equal(left("0::/job/step\n"), 850000);
    assert_int_equal(left("12:cpu:/elsewhere\n0::/job\n"), 850000);
    put("groups/job/step/memory.max", "500000\n");
    assert_int_equal(left("0::/job/step\n"), 200000);
    put("groups/job/step/memory.current", "600000\n");
    assert_int_equal(left("0::/job/step\n"), 0);
    put("groups/memory/old/memory.limit_in_bytes", "700000\n");
    put("groups/memory/old/memory.usage_in_bytes", "500000\n");
    put("groups/memory/old/memory.stat", "inactive_file 1\ntotal_inactive_file 100000\ntotal_active_file 30000\n");
    assert_int_equal(left("4:memory:/old\n3:cpuset:/\n"), 330000);
    assert_true(left("3:cpuset:/\n0::/\n") == SIZE_MAX);
    assert_true(group_memory_free(folder + "/groups", folder + "/missing") == SIZE_MAX);
    put("groups/memory.max", "90000\n");  // as a container sees its own
    assert_int_equal(left("0::/\n"), 90000);
}

// Fails where the path is followed wrongly, or the nearest name is not the one meant
static void paths_that_are_not_there(void**) {
    put("data/web_000.bin", "");
    put("data/notes.txt", "");
    put("data/.hidden", "");
    std::string d = folder + "/data";
    mkdir((folder + "/empty").c_str(), 0777);
    assert_string_equal(nearest_text(d + "/web_00.bin").c_str(), ("of the 2 names in '" + d + "' the nearest is 'web_000.bin'").c_str());
    assert_string_equal(nearest_text(d + "/note*.tx").c_str(), ("of the 2 names in '" + d + "' the nearest is 'notes.txt'").c_str());
    assert_string_equal(nearest_text(folder + "/empty/*.bin").c_str(), ("'" + folder + "/empty' is empty").c_str());
    assert_string_equal(nearest_text(folder + "/nowhere/far/*.bin").c_str(), ("there is no folder '" + folder + "/nowhere', but '" + folder + "' is there").c_str());
    assert_string_equal(nearest_text(folder + "/no*/a.bin").c_str(), ("no folder that matches '" + folder + "/no*' in '" + folder + "' has it").c_str());
    assert_string_equal(nearest_text(d + "/notes.txt/a.bin").c_str(), ("no folder, but a file, is '" + d + "/notes.txt', but '" + d + "' is there").c_str());
    assert_string_equal(nearest_text(d + "/" + std::string(90, 'x')).c_str(), ("'" + d + "' has 2 names unlike it").c_str());
    assert_string_equal(nearest_text("/nowhere.bin").substr(0, 7).c_str(), "of the ");
}

int main(void) {
    char name[] = "/tmp/troubleXXXXXX";
    folder = mkdtemp(name);
    const CMUnitTest tests[] = {cmocka_unit_test(gpus), cmocka_unit_test(nccl), cmocka_unit_test(launchers), cmocka_unit_test(errors), cmocka_unit_test(limits_of_control_groups),
        cmocka_unit_test(paths_that_are_not_there)};
    int failed = cmocka_run_group_tests_name("trouble", tests, NULL, NULL);
    return system(("rm -rf " + folder).c_str()) != 0 || failed != 0;
}
