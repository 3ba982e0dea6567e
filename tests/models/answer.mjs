// Answers questions about pictures with transformers.js: node answer.mjs PACKAGES MODELS NAME DTYPE PICTURE QUESTION ...
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [packages, models, name, dtype, ...questions] = process.argv.slice(2);
const entry = createRequire(packages + "/").resolve("@huggingface/transformers");
const { AutoModelForImageTextToText, AutoProcessor, RawImage, env } = await import(pathToFileURL(entry));
env.allowRemoteModels = false;
env.localModelPath = models;

const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name, { dtype, device: "cpu" });
const answers = [];
for (let place = 0; place < questions.length; place += 2) {
  const image = await RawImage.read(questions[place]);
  const content = [{ type: "image" }, { type: "text", text: questions[place + 1] }];
  const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const inputs = await processor(prompt, [image]);
  const ids = await model.generate({ ...inputs, do_sample: false, max_new_tokens: 32 });
  const answer = ids.slice(null, [inputs.input_ids.dims.at(-1), null]);
  answers.push(processor.batch_decode(answer, { skip_special_tokens: true })[0].trim());
}
console.log(JSON.stringify(answers));
