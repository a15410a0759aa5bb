// What transformers.js makes of a folder: {model, task, inputs, options} in as JSON on standard input, its answer out
// as JSON on standard output. Offline: only what lies in the folder can be read.
import { readFileSync } from 'node:fs';
import path from 'node:path';

import { Tensor, env, pipeline } from '@huggingface/transformers';

env.allowRemoteModels = false;
env.useFSCache = false;

const request = JSON.parse(readFileSync(0, 'utf8'));
env.localModelPath = path.dirname(request.model);
const run = await pipeline(request.task, path.basename(request.model), { dtype: 'fp32' });
const answer = await run(request.inputs, request.options);
console.log(JSON.stringify(answer instanceof Tensor ? answer.tolist() : answer));
