#include "gelu_table.h"

#include <cmath>

namespace convmixer_fast::cpu {
namespace {

struct Table {
  alignas(64) float coefficients[kTableTerms][kTableIntervals];

  Table() {
    for (int interval = 0; interval < kTableIntervals; ++interval) fit(interval);
  }

  // The polynomial through the function at the Chebyshev points, by Newton's divided differences.
  void fit(int interval) {
    constexpr double kPi = 3.14159265358979323846;
    constexpr int kPoints = kTableDegree + 1;
    double points[kPoints];
    double differences[kPoints];
    for (int i = 0; i < kPoints; ++i) {
      points[i] = 0.5 * std::cos(kPi * (2 * i + 1) / (2 * kPoints));
      const double t = (interval + points[i]) / static_cast<double>(kPerUnit);
      differences[i] = 0.5 * std::erfc(t / std::sqrt(2.0));
    }
    for (int order = 1; order < kPoints; ++order) {
      for (int i = kPoints - 1; i >= order; --i) {
        differences[i] =
            (differences[i] - differences[i - 1]) / (points[i] - points[i - order]);
      }
    }
    double polynomial[kPoints] = {};
    for (int order = kPoints - 1; order >= 0; --order) {
      // polynomial = polynomial * (u - points[order]) + differences[order]
      for (int term = kPoints - 1; term > 0; --term) {
        polynomial[term] = polynomial[term - 1] - polynomial[term] * points[order];
      }
      polynomial[0] = differences[order] - polynomial[0] * points[order];
    }
    for (int term = 0; term < kPoints; ++term) {
      coefficients[term][interval] = static_cast<float>(polynomial[term]);
    }
    coefficients[kPoints][interval] =
        static_cast<float>(polynomial[0] - static_cast<double>(coefficients[0][interval]));
  }
};

const Table kTable;

}  // namespace

const float (&kGeluTable)[kTableTerms][kTableIntervals] = kTable.coefficients;

}  // namespace convmixer_fast::cpu
