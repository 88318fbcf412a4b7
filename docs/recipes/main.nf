// Predict each case of a folder as a task of its own, with the memory that the tool's own estimate names.
//
//   nextflow run main.nf --images IMAGES --labels OUT --model MODEL -resume
//
// Also: --flags '-f 0 -device cpu' (for estimate and prediction alike), --threads 8, --ending .nrrd

params.flags = '-device cpu'
params.threads = '4'
params.ending = '.nii.gz'

process ESTIMATE { // for each case, so that a new one changes nothing for the others, and -resume finds them
    tag "$name"
    cpus params.threads as Integer
    memory 4.GB
    input:
    tuple val(name), path(images, stageAs: 'images/*')
    path model, stageAs: 'model'
    output:
    tuple val(name), path('estimate.json')

    script: // exit code 2 or 3, but an answer: it says why the case cannot be predicted
    """
    nnUNetv2_predict_lowmem --estimate --json -i images -o . -m model ${params.flags} > estimate.json || test -s estimate.json
    """
}

process PREDICT { // 512 MB are for libraries' own files: not in --max_ram, but in the resident set
    tag "$name"
    cpus params.threads as Integer
    memory { 512.MB + mebibytes.MB * (0.5 + 0.5 * task.attempt) }
    errorStrategy { task.attempt < 3 && (task.exitStatus == 3 || task.exitStatus > 128) ? 'retry' : 'ignore' }
    maxRetries 2
    publishDir params.labels, mode: 'copy'
    input:
    tuple val(name), path(images, stageAs: 'images/*'), val(mebibytes)
    path model, stageAs: 'model'
    output:
    path "${name}${params.ending}"

    script:
    """
    nnUNetv2_predict_lowmem -i images -o . -m model ${params.flags} --max_ram ${task.memory.toMega() - 512}MiB
    """
}

// What the case takes; projected_bytes alone would be too little where the estimate was made on a small machine.
def mebibytesOf(json) {
    def known = new groovy.json.JsonSlurper().parseText(json.text).findAll { each -> each.projected_bytes }
    def needs = known.collect { each -> [each.projected_bytes.RAM, each.least_ram_unspilled_bytes].max() }
    return Math.ceil((needs.max() ?: 1000000000) / 1048576) as Integer
}

workflow {
    model = file(params.model, checkIfExists: true)
    cases = channel.fromPath("${params.images}/*_[0-9][0-9][0-9][0-9]${params.ending}", checkIfExists: true)
        .map { image -> tuple(image.name.take(image.name.size() - params.ending.size() - 5), image) }
        .groupTuple(sort: true)
    needs = ESTIMATE(cases, model).map { name, json -> tuple(name, mebibytesOf(json)) }
    PREDICT(cases.join(needs), model)
}
