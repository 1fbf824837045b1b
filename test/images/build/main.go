// SPDX-License-Identifier: Apache-2.0

// Command build puts the workloads' image into the cache, for the guests, which
// have no network.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/syslatch/syslatch/test/images"
)

func main() {
	image, err := images.Workloads(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
	fmt.Println(image.Archive)
}
