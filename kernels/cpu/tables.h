// Constants of the AVX-512 Box-Muller (vec.h), each the float32 nearest to its float64 value; polynomials are minimax fits over the
// table's interval. -2 ln c is for the c that kLogScale really holds after its rounding.
#pragma once

namespace rse {
namespace {

// -2 / c
alignas(64) constexpr float kLogScale[32] = {
    -0x1p+2f, -0x1.e9131ap+1f, -0x1.dae608p+1f, -0x1.cd8568p+1f, -0x1.c0e07p+1f, -0x1.b4e81cp+1f, -0x1.a98ef6p+1f, -0x1.9ec8eap+1f,
    -0x1.948b1p+1f, -0x1.8acb9p+1f, -0x1.818182p+1f, -0x1.78a4c8p+1f, -0x1.702e06p+1f, -0x1.681682p+1f, -0x1.605816p+1f, -0x1.58ed24p+1f,
    -0x1.51d07ep+1f, -0x1.4afd6ap+1f, -0x1.446f86p+1f, -0x1.3e22ccp+1f, -0x1.381382p+1f, -0x1.323e34p+1f, -0x1.2c9fb4p+1f, -0x1.27350cp+1f,
    -0x1.21fb78p+1f, -0x1.1cf06ap+1f, -0x1.181182p+1f, -0x1.135c82p+1f, -0x1.0ecf56p+1f, -0x1.0a681p+1f, -0x1.0624dep+1f, -0x1p+1f,
};

// -2 ln c
alignas(64) constexpr float kLogValue[32] = {
    0x1.62e43p+0f, 0x1.4b6fd6p+0f, 0x1.3c6082p+0f, 0x1.2dbf54p+0f, 0x1.1f8636p+0f, 0x1.11af84p+0f, 0x1.04360cp+0f, 0x1.ee2a18p-1f,
    0x1.d49024p-1f, 0x1.bb961p-1f, 0x1.a33442p-1f, 0x1.8b639ap-1f, 0x1.741d88p-1f, 0x1.5d5bep-1f, 0x1.4718dcp-1f, 0x1.314f2p-1f,
    0x1.1bf994p-1f, 0x1.071386p-1f, 0x1.e530eep-2f, 0x1.bd0874p-2f, 0x1.95a5b2p-2f, 0x1.6f0124p-2f, 0x1.4913d2p-2f, 0x1.23d716p-2f,
    0x1.fe8912p-3f, 0x1.b6ac7cp-3f, 0x1.700d3ep-3f, 0x1.2aa058p-3f, 0x1.ccb726p-4f, 0x1.466adap-4f, 0x1.849286p-5f, 0x0p+0f,
};

// cos(pi k / 16)
alignas(64) constexpr float kCos[32] = {
    0x1p+0f, 0x1.f6297cp-1f, 0x1.d906bcp-1f, 0x1.a9b662p-1f, 0x1.6a09e6p-1f, 0x1.1c73b4p-1f, 0x1.87de2ap-2f, 0x1.8f8b84p-3f,
    0x0p+0f, -0x1.8f8b84p-3f, -0x1.87de2ap-2f, -0x1.1c73b4p-1f, -0x1.6a09e6p-1f, -0x1.a9b662p-1f, -0x1.d906bcp-1f, -0x1.f6297cp-1f,
    -0x1p+0f, -0x1.f6297cp-1f, -0x1.d906bcp-1f, -0x1.a9b662p-1f, -0x1.6a09e6p-1f, -0x1.1c73b4p-1f, -0x1.87de2ap-2f, -0x1.8f8b84p-3f,
    0x0p+0f, 0x1.8f8b84p-3f, 0x1.87de2ap-2f, 0x1.1c73b4p-1f, 0x1.6a09e6p-1f, 0x1.a9b662p-1f, 0x1.d906bcp-1f, 0x1.f6297cp-1f,
};

// sin(pi k / 16)
alignas(64) constexpr float kSin[32] = {
    0x0p+0f, 0x1.8f8b84p-3f, 0x1.87de2ap-2f, 0x1.1c73b4p-1f, 0x1.6a09e6p-1f, 0x1.a9b662p-1f, 0x1.d906bcp-1f, 0x1.f6297cp-1f,
    0x1p+0f, 0x1.f6297cp-1f, 0x1.d906bcp-1f, 0x1.a9b662p-1f, 0x1.6a09e6p-1f, 0x1.1c73b4p-1f, 0x1.87de2ap-2f, 0x1.8f8b84p-3f,
    0x0p+0f, -0x1.8f8b84p-3f, -0x1.87de2ap-2f, -0x1.1c73b4p-1f, -0x1.6a09e6p-1f, -0x1.a9b662p-1f, -0x1.d906bcp-1f, -0x1.f6297cp-1f,
    -0x1p+0f, -0x1.f6297cp-1f, -0x1.d906bcp-1f, -0x1.a9b662p-1f, -0x1.6a09e6p-1f, -0x1.1c73b4p-1f, -0x1.87de2ap-2f, -0x1.8f8b84p-3f,
};

constexpr float kMinusTwoLn2 = -1.3862943649291992f;
constexpr float kLogA = 0.250030517578125f;
constexpr float kLogB = 0.08255691826343536f;
constexpr float kSin1 = 3.141591787338257f;
constexpr float kSin3 = -5.164600372314453f;
constexpr float kCos2 = -4.9348015785217285f;
constexpr float kCos4 = 4.056897163391113f;

}  // namespace
}  // namespace rse
