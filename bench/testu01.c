/* testu01 BATTERY PART: test number PART of TestU01's battery (small, crush, big) on the 32-bit words of standard input.
   Prints a line "p-value<TAB>name" for each of its statistics. */
#include <TestU01.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static unsigned int buffer[1 << 14];
static size_t held, next;

static unsigned int word(void) {
    if (next == held) {
        held = fread(buffer, sizeof buffer[0], sizeof buffer / sizeof buffer[0], stdin);
        next = 0;
        if (!held) fprintf(stderr, "testu01: the words ended\n"), exit(1);
    }
    return buffer[next++];
}

int main(int argc, char** argv) {
    static int repeat[256]; /* more than any battery has tests */
    const int part = argc == 3 ? atoi(argv[2]) : 0;
    if (part < 1 || part > 106) return fprintf(stderr, "usage: testu01 small|crush|big PART\n"), 2;
    repeat[part] = 1;
    swrite_Basic = FALSE;
    /* Its own report goes to standard error. */
    FILE* const results = fdopen(dup(1), "w");
    dup2(2, 1);
    unif01_Gen* const generator = unif01_CreateExternGenBits("words", word);
    if (!strcmp(argv[1], "small")) bbattery_RepeatSmallCrush(generator, repeat);
    else if (!strcmp(argv[1], "crush")) bbattery_RepeatCrush(generator, repeat);
    else if (!strcmp(argv[1], "big")) bbattery_RepeatBigCrush(generator, repeat);
    else return fprintf(stderr, "testu01: no battery %s\n", argv[1]), 2;
    for (int i = 0; i < bbattery_NTests; ++i) fprintf(results, "%.17g\t%s\n", bbattery_pVal[i], bbattery_TestNames[i]);
    fclose(results);
    unif01_DeleteExternGenBits(generator);
    return 0;
}
