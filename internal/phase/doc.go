// SPDX-License-Identifier: Apache-2.0

// Package phase owns which phase an instance is in, and that the phase holds: it
// answers what the instance's filter asks about (SCMP_ACT_NOTIFY), and makes a switch
// hold for every task before it says so.
package phase
