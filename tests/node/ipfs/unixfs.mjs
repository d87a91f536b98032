// What @helia/unixfs calls some files under the profile unixfs-v1-2025. Reads JOB, prints CIDs as JSON.
import { readFileSync } from 'node:fs'
import { unixfs } from '@helia/unixfs'
import { fixedSize } from 'ipfs-unixfs-importer/chunker'
import { balanced } from 'ipfs-unixfs-importer/layout'

// The blocks are not looked at: a root CID is made from the bottom up.
const blockstore = { put: async (cid) => cid, get: async function * () {}, has: async () => false }
const files = unixfs({ blockstore })

async function * content (parts) {
  for (const [path, times] of parts) {
    const bytes = readFileSync(path)
    for (let n = 0; n < times; n++) yield bytes
  }
}

const found = []
for (const { parts, chunk, links } of JSON.parse(process.env.JOB)) {
  const options = { profile: 'unixfs-v1-2025' }
  if (chunk != null) options.chunker = fixedSize({ chunkSize: chunk })
  if (links != null) options.layout = balanced({ maxChildrenPerNode: links })
  found.push((await files.addByteStream(content(parts), options)).toString())
}
console.log(JSON.stringify(found))
