// SPDX-License-Identifier: Apache-2.0

package store_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
)

func Example() {
	dir, err := os.MkdirTemp("", "store")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	s, err := store.Open(dir, store.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	// The context bounds the wait for other writers of the same workload.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for i, calls := range [][]string{{"read", "write"}, {"read"}, {"mkdir", "read"}} {
		result, err := s.Add(ctx, &profiles.Recording{
			SchemaVersion: 1,
			ID:            fmt.Sprintf("run-%d", i+1),
			Workload:      "docker.io/library/nginx/web",
			Gate:          profiles.GateFilter,
			Phases:        map[string]profiles.Calls{profiles.DefaultPhase: {specs.ArchX86_64: calls}},
		}, store.AddOptions{Activate: true})
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println("new version:", result.Version != nil, "head:", result.Head, "observations:", result.Observations)
	}
	version, err := s.Active("docker.io/library/nginx/web")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(version.Manifest.Version, version.Manifest.Calls.Names(), version.Manifest.Recordings)
	// Output:
	// new version: true head: 1 observations: 1
	// new version: false head: 1 observations: 2
	// new version: true head: 2 observations: 3
	// 2 [mkdir read write] [run-1 run-3]
}
